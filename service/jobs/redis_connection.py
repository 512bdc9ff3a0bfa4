"""Redis clients, and the translation of Redis outages to `Unavailable`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from service.errors import Misconfigured, Unavailable

CONNECT_TIMEOUT = 2.0  #: seconds for establishing a connection
HEALTH_CHECK_INTERVAL = 15  #: idle seconds after which a connection is checked before it is used
MAX_CONNECTIONS = 4096  #: per process; every event listener uses one

#: reasons of an outage by exception class, subclasses first
UNAVAILABLE_REASONS: dict[type[Exception], str] = {
    exceptions.AuthenticationError: "it refuses our credentials",
    exceptions.BusyLoadingError: "it is loading its data",
    exceptions.ConnectionError: "it cannot be reached",
    exceptions.TimeoutError: "it does not respond in time",
    exceptions.ReadOnlyError: "it is a read-only replica",
    exceptions.OutOfMemoryError: "its memory is full",
    exceptions.MasterDownError: "its master is down",
    exceptions.NoScriptError: "it has just been started",
}

#: prefixes of error replies that mean an unhealthy server: failed persistence, a script that runs too long, a partial
#: cluster
UNHEALTHY_PREFIXES = ("MISCONF", "BUSY", "CLUSTERDOWN")


def redis_client(url: str, socket_timeout: float) -> redis.Redis:
    """Return a client that reconnects after a lost connection. A command that times out after `socket_timeout` is not
    repeated. Raises Misconfigured if the URL is not one of Redis."""
    try:
        redis.connection.parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError:  # whose message can contain a part of the password
        raise Misconfigured(
            "PALIMPSEST_REDIS_URL is not the URL of a Redis server: write for example redis://127.0.0.1:6379/0, and special "
            "characters of a password as %XX."
        ) from None
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), 3, (exceptions.ConnectionError,))
    return redis.Redis.from_url(url, retry=retry, **_connection_options(socket_timeout))


def async_redis_client(url: str, socket_timeout: float) -> Any:
    """Return a client for an event loop. No command is repeated."""
    return redis.asyncio.Redis.from_url(
        url, retry=AsyncRetry(NoBackoff(), 0), **_connection_options(socket_timeout)
    )


def _connection_options(socket_timeout: float) -> dict[str, Any]:
    return {
        "protocol": 2,
        "decode_responses": True,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_INTERVAL,
        "max_connections": MAX_CONNECTIONS,
    }


def as_unavailable(error: Exception) -> Unavailable | None:
    """Return the Unavailable error for an outage, without addresses in its text; None for any other error."""
    for kind, reason in UNAVAILABLE_REASONS.items():
        if isinstance(error, kind):
            return Unavailable(f"the queue does not answer: {reason}.")
    if isinstance(error, exceptions.ResponseError) and str(error).startswith(UNHEALTHY_PREFIXES):
        return Unavailable("the queue does not answer: it is unhealthy.")
    return None


@contextmanager
def translate_redis_errors() -> Iterator[None]:
    """Raise `Unavailable` for errors of Redis that mean an outage."""
    try:
        yield
    except exceptions.RedisError as error:
        if (outage := as_unavailable(error)) is None:
            raise
        raise outage from None
