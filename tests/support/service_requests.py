"""What the tests ask the operations for, and how they listen."""

from __future__ import annotations

import asyncio

from service.errors import Unavailable
from service.schemas import EditRequest, EvaluationRequest, TraceRequest

PROMPT = "The {} is located in"


def edit_request(subject="Eiffel Tower", prompt=PROMPT, target_new="Rome", **more):
    return EditRequest(subject=subject, prompt=prompt, target_new=target_new, **more)


def trace_request(**more):
    return TraceRequest(**{"prompt": "The Eiffel Tower is located in", "subject": "Eiffel Tower", **more})


def record(**more):
    return {"subject": "Eiffel Tower", "prompt": PROMPT, "target_new": "Rome", **more}


def evaluation_request(*records, **more):
    return EvaluationRequest(records=list(records) or [record()], **more)


def heard(operations, job_id, after=None):
    async def listen():
        async with asyncio.timeout(20):
            return [event async for event in operations.jobs.events(job_id, after)]

    return asyncio.run(listen())


def listened(broker, channel):
    async def listen():
        async with asyncio.timeout(20):
            return [event async for event in broker.events(channel)]

    return asyncio.run(listen())


def down(*_, **__):
    raise Unavailable("the queue is down.")
