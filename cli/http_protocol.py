"""One HTTP connection: uvicorn's protocol with limits on the time and the memory that a client can hold."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from api.overload import OverloadResponder
from cli.http_connections import ConnectionTable
from service.kit import metrics

MAX_HEADER_BYTES = 16_384  #: of a request line and its header
MAX_HEADER_LINES = 100
MAX_REQUEST_LINE = 8192  #: bytes of the method and the URL
_END_OF_HEADER = re.compile(rb"\n\r?\n")
#: bytes of one read: what a connection can make the parser do before other connections are served
READ_SIZE = 16_384
STALL = 5.0  #: seconds without a byte taken after which a connection may be closed for a new one
WARNING_INTERVAL = 60.0  #: seconds between two equal warnings


class OncePerInterval(logging.Filter):
    """Drops a warning that was logged within WARNING_INTERVAL: clients that are not authorized can cause them."""

    def __init__(self) -> None:
        super().__init__()
        self._logged_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        at, key = time.monotonic(), str(record.msg)
        if record.levelno > logging.WARNING:
            return True
        if at - self._logged_at.get(key, float("-inf")) < WARNING_INTERVAL:
            return False
        self._logged_at[key] = at
        return True


log = logging.getLogger("palimpsest.http")
log.addFilter(OncePerInterval())


class CountedTransport:
    """A transport that counts the bytes that are written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def sent(self) -> int:
        """Return how many bytes the system has taken."""
        return self._written - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def header_problem(received: bytes) -> tuple[int, str] | None:
    """Return the status and the text for a header with too many lines or a URL that is too long; None for others.

    The lines are counted before they are parsed, which takes a thousand times as long.
    """
    if received.find(b"\n", 0, MAX_REQUEST_LINE) < 0 and len(received) > MAX_REQUEST_LINE:
        return 414, f"The URL is longer than {MAX_REQUEST_LINE} bytes."
    end = _END_OF_HEADER.search(received)
    if received.count(b"\n", 0, end.start() if end else len(received)) > MAX_HEADER_LINES:
        return 431, f"The header has more than {MAX_HEADER_LINES} lines."
    return None


class HttpConnection(H11Protocol):
    """A connection in a table. `close_if_late`, which the table calls, applies the time limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        table: ConnectionTable,
        address: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.logger = log
        self.address, self.extra, self.request_count = address, False, 0
        self._table, self._limits = table, table.limits
        self._connected = self._evicted = False
        self._waiting_since: float | None = loop.time()
        self._header_since: float | None = self._waiting_since
        self._body_since = self._last_received = self._responded_at = self._sent_at = loop.time()
        self._received = self._sent = 0

    @property
    def idle_since(self) -> float | None:
        """Since when no request is in progress, or the client takes nothing of the response; None if neither."""
        if self._waiting_since is None and self._connected and self.flow.write_paused:
            return self._sent_at if self.loop.time() - self._sent_at > STALL else None
        return self._waiting_since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._evicted:
            transport.abort()
            return
        transport.max_size = READ_SIZE  # type: ignore[attr-defined]
        self._connected = True
        super().connection_made(cast(asyncio.Transport, CountedTransport(transport)))
        if self.extra:
            self.app = OverloadResponder(self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._table.remove(self)
        if self._connected:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._last_received = self.loop.time()
        self._received += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        """Parse what was received, then note what the connection waits for."""
        cycle = self.cycle
        if self._awaits_header() and (problem := header_problem(self.conn.trailing_data[0])):
            self._refuse(*problem)
            return
        super().handle_events()
        if self.cycle is not cycle:  # a header is complete
            self.request_count += 1
            self._waiting_since = self._header_since = None
            self._body_since, self._received = self.loop.time(), 0
        elif self._header_since is None and self._awaits_header() and self.conn.trailing_data[0]:
            self._header_since = self.loop.time()

    def on_response_complete(self) -> None:
        self._waiting_since = self._responded_at = self.loop.time()
        super().on_response_complete()

    def _should_upgrade(self) -> bool:
        """Serve a request that asks for another protocol as one that does not."""
        return False

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, or whose header is too large, and close the connection."""
        if len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
            self._refuse(431, f"The header is larger than {MAX_HEADER_BYTES} bytes.")
        else:
            self._refuse(400, msg)

    def evict(self) -> None:
        """Close the connection at once."""
        self._evicted = True
        if self._connected:
            self.transport.abort()

    def close_if_late(self, at: float) -> None:
        """Close the connection if it has exceeded a time limit."""
        if not self._connected:
            return
        limits = self._limits
        if self._is_writing(at):
            if at - self._sent_at > limits.write:
                self._count_closed("write")
                self.transport.abort()
        elif self.transport.is_closing():
            return
        elif self._header_since is not None:
            if at - self._header_since > limits.header:
                self._time_out("header")
        elif self.conn.their_state is h11.SEND_BODY:
            if self.flow.read_paused:  # by the application, which does not take the body
                self._last_received = at
            if at > (self._unread_deadline() if self.cycle.response_complete else self._body_deadline()):
                self._time_out("body")
        elif self._waiting_since is not None and at - self._waiting_since > limits.keep_alive:
            self.transport.close()

    def _is_writing(self, at: float) -> bool:
        """Return whether a part of a response waits for the client, and note when the client last took a byte."""
        waiting = self.transport.get_write_buffer_size() > 0
        sent = cast(CountedTransport, self.transport).sent()
        if not waiting or sent > self._sent:
            self._sent, self._sent_at = sent, at
        return waiting

    def _body_deadline(self) -> float:
        """Return when the body is late: after a pause, or below the least rate."""
        by_rate = self._body_since + self._limits.body + self._received / self._limits.body_rate
        return min(self._last_received + self._limits.body, by_rate)

    def _unread_deadline(self) -> float:
        """Return when the rest of a body, which is not used after the response, is late."""
        since_last_byte = max(self._responded_at, self._last_received) + self._limits.unread_pause
        return min(since_last_byte, self._responded_at + self._limits.unread_body)

    def _awaits_header(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _time_out(self, reason: str) -> None:
        """Close the connection, with status 408 if a part of a request was received and nothing was answered."""
        self._count_closed(reason)
        started = self.cycle is not None and not self.cycle.response_complete
        if started and self.cycle.response_started:
            self.transport.abort()
        elif started or (self._awaits_header() and self.conn.trailing_data[0]):
            self._respond_and_close(408, f"The request was not received in time: its {reason} is incomplete.")
        else:
            self.transport.close()

    def _refuse(self, status: int, text: str) -> None:
        self._count_closed("malformed")
        self._respond_and_close(status, text)

    def _count_closed(self, reason: str) -> None:
        metrics.HTTP_CONNECTIONS_CLOSED.labels(reason).inc()

    def _respond_and_close(self, status: int, text: str) -> None:
        """Answer, unless a response has begun, and close the connection. A request in progress ends as if its client
        had disconnected."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = text.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
