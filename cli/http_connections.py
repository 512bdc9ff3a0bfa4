"""The open connections of an HTTP server: their number, their time limits, and which one is closed for a new one."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from service.kit import metrics

#: descriptors kept for the database, the logs, files of the model and refused connections
RESERVED_DESCRIPTORS = 96
#: descriptors of one connection: its socket, and a connection to Redis while it streams events
DESCRIPTORS_PER_CONNECTION = 2
MIN_CONNECTIONS, MAX_CONNECTIONS = 16, 10_000
#: connections above the limit that are open at once, to be answered with 503 or to serve a probe
EXTRA_CONNECTIONS = 16
EVICTION_SHARE = 16  #: at the limit, up to 1/16 of the connections are closed at once
#: seconds in which a client sends its header unless it is slow
PROMPTNESS = 1.0
SWEEP_INTERVAL = 1.0  #: seconds between two checks of the time limits


@dataclass(frozen=True)
class TimeLimits:
    """Time limits of a connection in seconds, and the least rate of a body in bytes per second."""

    header: float = (
        10.0  #: from the connection, or the first byte of a later request, to the end of its header
    )
    body: float = 20.0  #: without a byte of the body
    body_rate: float = 1000.0  #: average rate of a body, after the first `body` seconds
    unread_pause: float = 5.0  #: without a byte of the rest of a body that is sent after the response
    #: for all of that rest; a client that is still sending reads the response only if the connection stays open
    unread_body: float = 30.0
    write: float = 60.0  #: without a byte of the response taken by the client
    keep_alive: float = 75.0  #: without a request after a response; longer than the timeout of common proxies

    def sweep_interval(self) -> float:
        """Return the seconds between two checks, shorter than each limit."""
        shortest = min(
            self.header, self.body, self.unread_pause, self.unread_body, self.write, self.keep_alive
        )
        return min(SWEEP_INTERVAL, shortest / 4)


class Connection(Protocol):
    """What the table needs to know of a connection."""

    address: str  #: of the client, without its port
    extra: bool  #: whether it was accepted above the limit
    request_count: int  #: requests whose header is complete

    @property
    def idle_since(self) -> float | None:
        """Since when no request is in progress, or the client takes nothing of the response; None if neither."""

    def close_if_late(self, at: float) -> None:
        """Close the connection if it has exceeded a time limit."""

    def evict(self) -> None:
        """Close the connection at once."""


def default_max_connections() -> int:
    """Return the number of connections that the limit of open files of this process allows."""
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    allowed = (open_files - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_CONNECTION
    return max(MIN_CONNECTIONS, min(allowed, MAX_CONNECTIONS))


class ConnectionTable:
    """The open connections of one server, in the order of their arrival. Used by the event loop only."""

    def __init__(
        self, max_connections: int, limits: TimeLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_connections, self.limits, self._clock = max_connections, limits, clock
        self._open: dict[Connection, None] = {}
        self._extra: dict[Connection, None] = {}

    def admit(self, connection: Connection) -> bool:
        """Add a connection; return False if it must be closed at once.

        At the limit, idle connections are closed for it. When all are busy, it is one of a few extra connections, on
        which only probes are served.
        """
        if len(self._open) >= self.max_connections:
            self.evict_idle(max(1, self.max_connections // EVICTION_SHARE))
        if len(self._open) < self.max_connections:
            self._open[connection] = None
        elif len(self._extra) < EXTRA_CONNECTIONS or self._evict(self._by_priority(self._extra)[:1]):
            connection.extra = True
            self._extra[connection] = None
        else:
            metrics.HTTP_CONNECTIONS_CLOSED.labels("refused").inc()
            return False
        metrics.HTTP_CONNECTIONS.inc()
        return True

    def remove(self, connection: Connection) -> None:
        """Remove a connection that has been closed; idempotent."""
        members = self._extra if connection.extra else self._open
        if connection in members:
            del members[connection]
            metrics.HTTP_CONNECTIONS.dec()

    def evict_idle(self, count: int) -> bool:
        """Close the first idle connection, and up to `count` that have sent no request. Return whether any was."""
        idle = self._by_priority(self._open)[:count]
        return self._evict([*idle[:1], *filter(self._is_late, idle[1:])])

    def _by_priority(self, connections: Iterable[Connection]) -> list[Connection]:
        """Return the idle connections in the order in which they are closed for others.

        Those of the address with most of them come first; of one address those without a request that are late, those
        that have served one, and the others; and of these the longest waiting.
        """
        idle = [(since, c) for c in connections if (since := c.idle_since) is not None]
        per_address = Counter(c.address for _, c in idle)

        def rank(item: tuple[float, Connection]) -> tuple[float, ...]:
            since, connection = item
            group = 0 if self._is_late(connection) else 1 if connection.request_count else 2
            return (-per_address[connection.address], group, since)

        return [connection for _, connection in sorted(idle, key=rank)]

    def _is_late(self, connection: Connection) -> bool:
        """Return whether a connection has sent no request for longer than a prompt client takes."""
        since = connection.idle_since
        return not connection.request_count and since is not None and self._clock() - since > PROMPTNESS

    def _evict(self, connections: Iterable[Connection]) -> bool:
        evicted = False
        for connection in connections:
            evicted = True
            self.remove(connection)
            connection.evict()
            metrics.HTTP_CONNECTIONS_CLOSED.labels("evicted").inc()
        return evicted

    async def enforce_time_limits(self, loop: asyncio.AbstractEventLoop) -> None:
        """Check the time limits of all connections, until cancelled."""
        while True:
            await asyncio.sleep(self.limits.sweep_interval())
            for connection in [*self._open, *self._extra]:
                connection.close_if_late(loop.time())
