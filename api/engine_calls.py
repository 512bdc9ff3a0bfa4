"""Calls to a worker (generation, comparison): wait for the result, stream events, resubmit lost calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.disconnects import cancel_on_disconnect
from service.application import Services
from service.application.caller import Caller
from service.errors import Unavailable, error_from_document
from service.jobs.broker import Broker, Event
from service.jobs.event_stream import with_idle_ticks
from service.schemas import CompareRequest, GenerateRequest

#: seconds without events after which the API checks that a worker is alive
WORKER_CHECK_INTERVAL = 30.0
#: seconds between checks that the broker knows a silent call; unknown twice in a row means lost
SILENCE_CHECK_INTERVAL = 1.5
MAX_RESUBMISSIONS = 5  #: maximum number of resubmissions of one call


@dataclass(frozen=True)
class EngineCall:
    """A submitted generation or comparison, and the channel of its events."""

    kind: str
    channel: str
    request: GenerateRequest | CompareRequest
    services: Services
    broker: Broker
    caller: Caller

    async def events(self) -> AsyncGenerator[Event]:
        """Yield the events. Raises Unavailable if no worker is alive, or if the broker loses the call repeatedly."""
        detector = _LostCallDetector(self)
        async with aclosing(
            with_idle_ticks(
                self.broker.events(self.channel), min(SILENCE_CHECK_INTERVAL, WORKER_CHECK_INTERVAL)
            )
        ) as events_or_idle:
            async for event in events_or_idle:
                if event is None:
                    await detector.check()
                else:
                    detector.event_received()
                    yield event

    async def wait_for_result(self, request: Request) -> dict[str, Any] | None:
        """Return the data of `end`, or None if the client disconnects, which cancels the call. Raises the error of
        `error`."""
        finished = False

        async def last_event_data() -> dict[str, Any]:
            nonlocal finished
            async with aclosing(self.events()) as events:
                async for event in events:
                    finished = event.name in ("end", "error")
                    if event.name == "end":
                        return event.data
                    if event.name == "error":
                        raise error_from_document(event.data)
            raise Unavailable("The service is shutting down: try again.")

        try:
            return await cancel_on_disconnect(request, last_event_data())
        finally:
            if not finished:
                with anyio.CancelScope(shield=True):
                    await self.cancel()

    async def cancel(self) -> None:
        """Cancel the call. A broker outage is ignored: a broker that is down does not deliver the call."""
        with suppress(Unavailable):
            await run_in_threadpool(self.broker.cancel, self.channel)


class _LostCallDetector:
    """Checks during silence that a worker is alive and that the broker still knows the call; resubmits a lost call."""

    def __init__(self, call: EngineCall) -> None:
        self._call = call
        self._silent_checks = self._unknown_checks = self._resubmissions = 0

    def event_received(self) -> None:
        self._silent_checks = self._unknown_checks = 0

    async def check(self) -> None:
        call = self._call
        self._silent_checks += 1
        if self._silent_checks * min(SILENCE_CHECK_INTERVAL, WORKER_CHECK_INTERVAL) >= WORKER_CHECK_INTERVAL:
            self._silent_checks = 0
            await run_in_threadpool(call.services.models.require_worker_for, call.kind)
        if await self._is_lost():
            await self._resubmit()

    async def _is_lost(self) -> bool:
        with suppress(Unavailable):  # `events` raises if the outage lasts
            is_pending = await run_in_threadpool(self._call.broker.is_pending, self._call.channel)
            self._unknown_checks = 0 if is_pending else self._unknown_checks + 1
        return self._unknown_checks >= 2  # once can be a race with its last event

    async def _resubmit(self) -> None:
        call = self._call
        if self._resubmissions == MAX_RESUBMISSIONS:
            raise Unavailable("the broker lost this request repeatedly: check its persistence.")
        with suppress(Unavailable):
            await run_in_threadpool(
                call.services.generation.resubmit, call.kind, call.channel, call.request, call.caller
            )
            self._unknown_checks, self._resubmissions = 0, self._resubmissions + 1
