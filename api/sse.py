"""Server-sent events: the events of a channel as text/event-stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import anyio
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import encode_json, problem_responses
from api.large_answers import is_large
from service.errors import PalimpsestError, error_document
from service.jobs.broker import Event
from service.jobs.event_stream import with_idle_ticks

KEEPALIVE_INTERVAL = 15.0  #: seconds; proxies and clients close idle connections
EVENT_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

#: one event of a stream, for the OpenAPI document
_STRING_SCHEMA = {"type": "string"}
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "id": _STRING_SCHEMA,
        "event": _STRING_SCHEMA,
        "data": {**_STRING_SCHEMA, "description": "JSON in one line"},
    },
    "required": ["event", "data"],
}
EVENT_STREAM_CONTENT: dict[str, Any] = {"text/event-stream": {"schema": _EVENT_SCHEMA}}
#: responses of a route that streams the events of a job
JOB_EVENTS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "`progress` events, then `end`", "content": EVENT_STREAM_CONTENT},
    **problem_responses(404, 422, 500, 503),
}


def encode_event(event: Event) -> bytes:
    """Return the bytes of an event. JSON contains no line breaks, so `data` is one line."""
    head = f"id: {event.id}\nevent: {event.name}\ndata: ".encode() if event.id else b""
    return (head or f"event: {event.name}\ndata: ".encode()) + encode_json(event.data) + b"\n\n"


async def encode_event_stream(events: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
    """Yield every event as bytes, a comment while idle, and an `error` event if the channel fails."""
    yield b": open\n\n"  # flushes the headers
    try:
        async with aclosing(with_idle_ticks(events, KEEPALIVE_INTERVAL)) as events_or_idle:
            async for event in events_or_idle:
                if event is None:
                    yield b": ping\n\n"
                elif is_large(event.data):
                    yield await run_in_threadpool(encode_event, event)
                else:
                    yield encode_event(event)
    except PalimpsestError as error:
        yield encode_event(Event("", "error", error_document(error)))


class EventStreamResponse(StreamingResponse):
    """A stream that is always closed when the client disconnects; `on_close` runs afterwards."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Event],
        on_close: Callable[[], Awaitable[None]] | None = None,
        encode: Callable[[AsyncIterator[Event]], AsyncGenerator[bytes]] = encode_event_stream,
    ) -> None:
        self.frames = encode(events)
        self.on_close = on_close
        super().__init__(self.frames, headers=EVENT_STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.frames.aclose()
                if self.on_close is not None:
                    await self.on_close()
