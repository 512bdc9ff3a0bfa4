"""Connections to Redis, and the house's word for every way in which Redis can be away."""

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

from service.errors import Unavailable

CONNECT_TIMEOUT = 2.0  #: seconds until a connection stands
HEALTH_CHECK_INTERVAL = 15  #: a connection that was idle for so many seconds is tried before it is used
MAX_CONNECTIONS = 4096  #: of one process at most: every listener holds one

#: why Redis does not serve us, the narrower first
UNAVAILABLE_REASONS: dict[type[Exception], str] = {
    exceptions.AuthenticationError: "it refuses our credentials",
    exceptions.BusyLoadingError: "it is loading its data",
    exceptions.ConnectionError: "it cannot be reached",
    exceptions.TimeoutError: "it is silent",
    exceptions.ReadOnlyError: "it is a read-only replica",
    exceptions.OutOfMemoryError: "its memory is full",
    exceptions.MasterDownError: "its master is down",
    exceptions.NoScriptError: "it has just been started",
}

#: refusals that are no mistake of ours: it cannot write its files, a script runs away, a cluster is in pieces
UNHEALTHY_PREFIXES = ("MISCONF", "BUSY", "CLUSTERDOWN")


def redis_client(url: str, socket_timeout: float) -> redis.Redis:
    """A connection that was cut is made anew at once; a Redis that is silent for `answer` seconds is not asked twice."""
    retry = Retry(ExponentialBackoff(cap=0.2, base=0.02), 3, (exceptions.ConnectionError,))
    return redis.Redis.from_url(url, retry=retry, **_connection_options(socket_timeout))


def async_redis_client(url: str, socket_timeout: float) -> Any:
    """The same for an event loop; nothing is asked twice."""
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
    """What the house raises for it, without addresses; None when it is no outage but a mistake."""
    for kind, reason in UNAVAILABLE_REASONS.items():
        if isinstance(error, kind):
            return Unavailable(f"the queue does not answer: {reason}.")
    if isinstance(error, exceptions.ResponseError) and str(error).startswith(UNHEALTHY_PREFIXES):
        return Unavailable("the queue does not answer: it is not fit to serve.")
    return None


@contextmanager
def translate_redis_errors() -> Iterator[None]:
    """What Redis raises while it is away is `Unavailable`."""
    try:
        yield
    except exceptions.RedisError as error:
        if (outage := as_unavailable(error)) is None:
            raise
        raise outage from None
