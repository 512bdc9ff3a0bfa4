"""Event streams with idle ticks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import anyio

from service.errors import PalimpsestError
from service.jobs.broker import Event


async def with_idle_ticks(events: AsyncIterator[Event], idle_interval: float) -> AsyncGenerator[Event | None]:
    """Yield the events, and None after every `idle_interval` seconds without one."""
    pending: asyncio.Task[Event | None] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(_next_event(events))
            done, _ = await asyncio.wait({pending}, timeout=idle_interval)
            if not done:
                yield None
                continue
            event, pending = pending.result(), None
            if event is None:
                return
            yield event
    finally:
        with anyio.CancelScope(shield=True):
            if pending is not None:
                await _cancel_and_wait(pending)
            if (close := getattr(events, "aclose", None)) is not None:
                await close()


async def _next_event(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


async def _cancel_and_wait(task: asyncio.Task[Event | None]) -> None:
    """Cancel a task, wait for its end and ignore its result."""
    task.cancel()
    with suppress(asyncio.CancelledError, PalimpsestError, Exception):
        await task
