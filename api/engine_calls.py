"""A call to a worker, held until it is answered: what generation and comparison share."""

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
from service.errors import Unavailable, error_from_document
from service.jobs.broker import Broker, Event
from service.jobs.event_stream import with_idle_ticks
from service.schemas import CompareRequest, GenerateRequest

#: after this many silent seconds the service asks itself whether there is a worker at all
WORKER_CHECK_INTERVAL = 30.0
#: after this many silent seconds, twice in a row, a call that the queue does not know is lost
SILENCE_CHECK_INTERVAL = 1.5
MAX_RESUBMISSIONS = 5  #: times that one call is asked again


@dataclass(frozen=True)
class EngineCall:
    """A generation or a comparison that was asked for, and the channel on which its answer comes."""

    kind: str
    channel: str
    request: GenerateRequest | CompareRequest
    services: Services
    broker: Broker

    async def events(self) -> AsyncGenerator[Event]:
        """Its events. Unavailable when no worker is there to answer, or the queue loses the call again and again."""
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
        """The data of its `end`; its `error` is raised; None when the client goes, and the call ends with it."""
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
            raise Unavailable("The service is stopping: ask again in a moment.")

        try:
            return await cancel_on_disconnect(request, last_event_data())
        finally:
            if not finished:
                with anyio.CancelScope(shield=True):
                    await self.cancel()

    async def cancel(self) -> None:
        """Nobody waits any more. A queue that is down will not deliver it either."""
        with suppress(Unavailable):
            await run_in_threadpool(self.broker.cancel, self.channel)


class _LostCallDetector:
    """Looks for a call that has fallen silent: is it still known, and is anybody there?"""

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
        with suppress(Unavailable):  # the events say so themselves when the queue stays away
            is_pending = await run_in_threadpool(self._call.broker.is_pending, self._call.channel)
            self._unknown_checks = 0 if is_pending else self._unknown_checks + 1
        return self._unknown_checks >= 2  # once can be an answer that is on its way

    async def _resubmit(self) -> None:
        call = self._call
        if self._resubmissions == MAX_RESUBMISSIONS:
            raise Unavailable("the queue lost this request again and again: see that it keeps its data.")
        with suppress(Unavailable):
            await run_in_threadpool(call.services.generation.resubmit, call.kind, call.channel, call.request)
            self._unknown_checks, self._resubmissions = 0, self._resubmissions + 1
