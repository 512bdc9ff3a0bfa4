"""A call to a worker, held until it is answered: what generation and comparison share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.disconnects import unless_gone
from api.errors import from_event
from service.application import Operations
from service.errors import Unavailable
from service.jobs.broker import Broker, Event
from service.jobs.event_stream import heard
from service.schemas import CompareRequest, GenerateRequest

#: after this many silent seconds the service asks itself whether there is a worker at all
PATIENCE = 30.0
#: after this many silent seconds, twice in a row, a call that the queue does not know is lost
LOOK = 1.5
AGAIN = 5  #: times that one call is asked again


@dataclass(frozen=True)
class Call:
    """A generation or a comparison that was asked for, and the channel on which its answer comes."""

    kind: str
    channel: str
    request: GenerateRequest | CompareRequest
    work: Operations
    broker: Broker

    async def events(self) -> AsyncGenerator[Event]:
        """Its events. Unavailable when no worker is there to answer, or the queue loses the call again and again."""
        search = _Search(self)
        async with aclosing(heard(self.broker.events(self.channel), min(LOOK, PATIENCE))) as every:
            async for event in every:
                if event is None:
                    await search.look()
                else:
                    search.found()
                    yield event

    async def answer(self, request: Request) -> dict[str, Any] | None:
        """The data of its `end`; its `error` is raised; None when the client goes, and the call ends with it."""
        told = False

        async def last() -> dict[str, Any]:
            nonlocal told
            async with aclosing(self.events()) as events:
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
                    await self.hang_up()

    async def hang_up(self) -> None:
        """Nobody waits any more. A queue that is down will not deliver it either."""
        with suppress(Unavailable):
            await run_in_threadpool(self.broker.cancel, self.channel)


class _Search:
    """Looks for a call that has fallen silent: is it still known, and is anybody there?"""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._silent = self._missed = self._asked = 0

    def found(self) -> None:
        self._silent = self._missed = 0

    async def look(self) -> None:
        call = self._call
        self._silent += 1
        if self._silent * min(LOOK, PATIENCE) >= PATIENCE:
            self._silent = 0
            await run_in_threadpool(call.work.models.check_attended, call.kind)
        if await self._is_lost():
            await self._ask_again()

    async def _is_lost(self) -> bool:
        with suppress(Unavailable):  # the events say so themselves when the queue stays away
            known = await run_in_threadpool(self._call.broker.knows, self._call.channel)
            self._missed = 0 if known else self._missed + 1
        return self._missed >= 2  # once can be an answer that is on its way

    async def _ask_again(self) -> None:
        call = self._call
        if self._asked == AGAIN:
            raise Unavailable("the queue lost this request again and again: see that it keeps its data.")
        with suppress(Unavailable):
            await run_in_threadpool(call.work.calls.ask_again, call.kind, call.channel, call.request)
            self._missed, self._asked = 0, self._asked + 1
