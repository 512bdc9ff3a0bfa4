"""Waiting without a thread: for the end of a job, and for the disconnect of a client."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, aclosing, suppress
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool

from api.errors import RateLimitExceeded
from api.quotas import slot_of_caller
from service.errors import PalimpsestError
from service.jobs.broker import Event
from service.jobs.event_stream import with_idle_ticks

T = TypeVar("T")
MAX_WAIT = 60
_WAIT_PATTERN = re.compile(r'(?:^|[,\s])wait\s*=\s*"?(\d{1,9})"?\s*(?:$|[,;])', re.IGNORECASE)
#: seconds between reads of the row while waiting, in case the event is lost
_POLL_INTERVAL = 2.0


async def _preferred_wait(
    request: Request,
    response: Response,
    prefer: Annotated[
        str | None,
        Header(description="`wait=SECONDS` waits until the job ends, at most 60 seconds"),
    ] = None,
) -> AsyncIterator[float]:
    """Yield the seconds to wait: 0 without the preference, for a large request, and for a
    caller that has too much open already."""
    match = _WAIT_PATTERN.search(prefer or "")
    may_wait: bool = getattr(request.state, "may_wait", True)
    seconds = min(int(match[1]), MAX_WAIT) if match and may_wait else 0
    with ExitStack() as stack:
        try:
            if seconds:
                stack.enter_context(slot_of_caller(request))
                response.headers["Preference-Applied"] = f"wait={seconds}"
        except RateLimitExceeded:
            seconds = 0
        yield seconds


#: seconds that the client waits (RFC 7240)
WaitSeconds = Annotated[float, Depends(_preferred_wait)]


def is_finished(resource: dict[str, Any]) -> bool:
    """Return whether a job has ended."""
    return resource["status"] not in ("queued", "running")


async def wait_until_finished(
    resource: dict[str, Any],
    fetch: Callable[[str], dict[str, Any]],
    subscribe: Callable[[str], AsyncIterator[Event]],
    seconds: float,
) -> dict[str, Any]:
    """Return the resource when it has ended, or its state after `seconds`. The row is authoritative; events only
    wake."""
    deadline = time.monotonic() + seconds
    if seconds <= 0 or is_finished(resource):
        return resource
    channel_closed = asyncio.create_task(_consume(subscribe(resource["id"])))
    try:
        while not is_finished(resource) and (remaining := deadline - time.monotonic()) > 0:
            pause = min(remaining, _POLL_INTERVAL)
            if channel_closed.done():  # the channel is closed and the row is not committed yet
                await asyncio.sleep(min(pause, 0.1))
            else:
                await asyncio.wait({channel_closed}, timeout=pause)
            resource = await run_in_threadpool(fetch, resource["id"])
    finally:
        await _cancel_task(channel_closed)
    return resource


async def wait_until_all_finished(
    resources: Iterable[dict[str, Any]],
    fetch: Callable[[str], dict[str, Any]],
    subscribe: Callable[[str], AsyncIterator[Event]],
    seconds: float,
) -> list[dict[str, Any]]:
    """Wait for several resources within the same time limit."""
    deadline = time.monotonic() + seconds
    return [
        await wait_until_finished(resource, fetch, subscribe, deadline - time.monotonic())
        for resource in resources
    ]


async def cancel_on_disconnect(request: Request, awaitable: Awaitable[T]) -> T | None:
    """Return the result, or None if the client disconnects first, which cancels the awaitable."""
    task = asyncio.ensure_future(awaitable)
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        with anyio.CancelScope(shield=True):
            await _cancel_task(disconnected)
            await _cancel_task(task)


async def _consume(events: AsyncIterator[Event]) -> None:
    async with aclosing(with_idle_ticks(events, MAX_WAIT)) as events_or_idle:
        async for _ in events_or_idle:
            pass


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel_task(task: asyncio.Future[Any]) -> None:
    """Cancel a task and ignore its result."""
    task.cancel()
    with suppress(asyncio.CancelledError, PalimpsestError, Exception):
        await task
