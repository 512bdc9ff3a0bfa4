"""A call to a worker, held until it is answered: what generation and comparison share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import anyio
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.errors import from_event
from api.waiting import heard, unless_gone
from service.errors import Unavailable
from service.jobs.broker import Broker, Event
from service.operations import Operations

#: after this many silent seconds the service asks itself whether there is a worker at all
PATIENCE = 30.0


async def attended(work: Operations, events: AsyncIterator[Event]) -> AsyncGenerator[Event]:
    """The events of a call; Unavailable when they fall silent because no worker is there to answer."""
    async with aclosing(heard(events, PATIENCE)) as every:
        async for event in every:
            if event is None:
                await run_in_threadpool(work.ready)
            else:
                yield event


async def answer(request: Request, work: Operations, broker: Broker, channel: str) -> dict[str, Any] | None:
    """The data of the call's `end`; its `error` is raised; None when the client goes, and the call ends with it."""
    told = False

    async def last() -> dict[str, Any]:
        nonlocal told
        async with aclosing(attended(work, broker.events(channel))) as events:
            async for event in events:
                told = event.name in ("end", "error")
                if event.name == "end":
                    return event.data
                if event.name == "error":
                    raise from_event(event.data)
        raise Unavailable("The service is stopping: ask again in a moment.")

    try:
        return await unless_gone(request, last())
    finally:
        if not told:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(broker.cancel, channel)
