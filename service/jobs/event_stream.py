"""Listening with a look around in the silences."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import anyio

from service.errors import PalimpsestError
from service.jobs.broker import Event


async def heard(events: AsyncIterator[Event], silence: float) -> AsyncGenerator[Event | None]:
    """The events, and None after every `silence` seconds without one."""
    following: asyncio.Task[Event | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({following}, timeout=silence)
            if not done:
                yield None
                continue
            event, following = following.result(), None
            if event is None:
                return
            yield event
    finally:
        with anyio.CancelScope(shield=True):
            if following is not None:
                await _drop(following)
            if (close := getattr(events, "aclose", None)) is not None:
                await close()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


async def _drop(task: asyncio.Task[Event | None]) -> None:
    """End a task whose result nobody needs."""
    task.cancel()
    with suppress(asyncio.CancelledError, PalimpsestError, Exception):
        await task
