"""Requests to the application services, and readers of events."""

from __future__ import annotations

import asyncio
from typing import Any

from service.application import Services
from service.errors import Unavailable
from service.jobs.broker import Broker
from service.schemas import EditRequest, EvaluationRequest, TraceRequest

PROMPT = "The {} is located in"


def edit_request(
    subject: str = "Eiffel Tower", prompt: str = PROMPT, target_new: Any = "Rome", **more: Any
) -> Any:
    return EditRequest(subject=subject, prompt=prompt, target_new=target_new, **more)


def trace_request(**more: Any) -> Any:
    return TraceRequest(**{"prompt": "The Eiffel Tower is located in", "subject": "Eiffel Tower", **more})


def evaluation_record(**more: Any) -> Any:
    return {"subject": "Eiffel Tower", "prompt": PROMPT, "target_new": "Rome", **more}


def evaluation_request(*records: Any, **more: Any) -> Any:
    return EvaluationRequest(records=list(records) or [evaluation_record()], **more)


def collect_job_events(services: Services, job_id: str, after: Any = None) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in services.jobs.events(job_id, after)]

    return asyncio.run(listen())


def collect_channel_events(broker: Broker, channel: str) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in broker.events(channel)]

    return asyncio.run(listen())


def raise_unavailable(*_: Any, **__: Any) -> None:
    raise Unavailable("the queue is down.")
