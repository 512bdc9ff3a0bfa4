"""Server-sent events: what a channel says, as text/event-stream, for as long as the client listens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import encode, problems
from service.errors import PalimpsestError
from service.jobs.broker import Event
from service.jobs.event_stream import heard

PING = 15.0  # seconds; proxies and clients drop a connection that says nothing
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

#: one event of a stream, for the OpenAPI document
_TEXT = {"type": "string"}
_EVENT = {
    "type": "object",
    "properties": {"id": _TEXT, "event": _TEXT, "data": {**_TEXT, "description": "JSON in one line"}},
    "required": ["event", "data"],
}
DOCUMENTED: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
#: the answers of a route that follows a job
FOLLOWED: dict[int | str, dict[str, Any]] = {
    200: {"description": "`progress` events, then `end`", "content": DOCUMENTED},
    **problems(404, 422, 500, 503),
}


def frame(event: Event) -> bytes:
    """One event on the wire. JSON has no bare line break, so `data` is one line."""
    head = f"id: {event.id}\nevent: {event.name}\ndata: ".encode() if event.id else b""
    return (head or f"event: {event.name}\ndata: ".encode()) + encode(event.data) + b"\n\n"


async def frames(events: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
    """Every event, a comment in the silences between, and an `error` where the channel itself breaks."""
    yield b": open\n\n"  # sends the headers at once
    try:
        async with aclosing(heard(events, PING)) as every:
            async for event in every:
                yield b": ping\n\n" if event is None else frame(event)
    except PalimpsestError as error:
        yield frame(Event("", "error", {"title": error.title, "detail": error.detail}))


class EventStream(StreamingResponse):
    """A stream that is closed for certain when the client goes; `closing` then runs, whatever was sent until then."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Event],
        closing: Callable[[], Awaitable[None]] | None = None,
        framed: Callable[[AsyncIterator[Event]], AsyncGenerator[bytes]] = frames,
    ) -> None:
        self.frames = framed(events)
        self.closing = closing
        super().__init__(self.frames, headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.frames.aclose()
                if self.closing is not None:
                    await self.closing()
