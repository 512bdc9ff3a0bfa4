"""Waiting without holding a thread: for the end of a job, for a client to go."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.errors import PalimpsestError
from service.jobs.broker import Event
from service.jobs.event_stream import heard

T = TypeVar("T")
MAX_WAIT = 60
_WAIT = re.compile(r'(?:^|[,\s])wait\s*=\s*"?(\d{1,9})"?\s*(?:$|[,;])', re.IGNORECASE)
#: the row is read again this often while its end is waited for, should the bell be lost
_LOOK_AGAIN = 2.0


async def _preference(
    response: Response,
    prefer: Annotated[
        str | None,
        Header(
            description="`wait=SECONDS` holds the answer until the job ends or the time is up; 60 at most"
        ),
    ] = None,
) -> float:
    found = _WAIT.search(prefer or "")
    if not found:
        return 0
    seconds = min(int(found[1]), MAX_WAIT)
    response.headers["Preference-Applied"] = f"wait={seconds}"
    return seconds


#: seconds that the client wants to wait (RFC 7240)
Wait = Annotated[float, Depends(_preference)]


def ended(resource: dict[str, Any]) -> bool:
    """Whether a job is over, whatever became of it."""
    return resource["status"] not in ("queued", "running")


async def until_ended(
    resource: dict[str, Any],
    read: Callable[[str], dict[str, Any]],
    news: Callable[[str], AsyncIterator[Event]],
    seconds: float,
) -> dict[str, Any]:
    """The resource when it has ended, or as it stands after `seconds`. Its row is the truth; `news` is the bell."""
    give_up = time.monotonic() + seconds
    if seconds <= 0 or ended(resource):
        return resource
    bell = asyncio.create_task(_exhaust(news(resource["id"])))
    try:
        while not ended(resource) and (left := give_up - time.monotonic()) > 0:
            pause = min(left, _LOOK_AGAIN)
            if bell.done():  # the channel closed and the row has not followed yet
                await asyncio.sleep(min(pause, 0.1))
            else:
                await asyncio.wait({bell}, timeout=pause)
            resource = await run_in_threadpool(read, resource["id"])
    finally:
        await _drop(bell)
    return resource


async def all_until_ended(
    resources: Iterable[dict[str, Any]],
    read: Callable[[str], dict[str, Any]],
    news: Callable[[str], AsyncIterator[Event]],
    seconds: float,
) -> list[dict[str, Any]]:
    """The same for several, one after the other within the same time."""
    give_up = time.monotonic() + seconds
    return [await until_ended(one, read, news, give_up - time.monotonic()) for one in resources]


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the client hangs up first; the work is cancelled then."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        with anyio.CancelScope(shield=True):
            await _drop(gone)
            await _drop(working)


async def _exhaust(events: AsyncIterator[Event]) -> None:
    async with aclosing(heard(events, MAX_WAIT)) as every:
        async for _ in every:
            pass


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _drop(task: asyncio.Future[Any]) -> None:
    """End a task whose result nobody needs."""
    task.cancel()
    with suppress(asyncio.CancelledError, PalimpsestError, Exception):
        await task
