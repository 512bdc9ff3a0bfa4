"""How often a key may ask: a sliding minute, counted in Redis where there is one, so that all processes count together.

A limit protects the service from a client, not a secret from a thief: when Redis is down everybody passes.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from api.errors import TooManyRequests
from service.kit import metrics

log = logging.getLogger(__name__)

PATIENCE = 1.0  #: seconds in which Redis must answer
REST = 5.0  #: seconds for which a Redis that did not answer is left alone
SILENCE = 60.0  #: seconds between two log lines about it


@dataclass(frozen=True)
class Limits:
    """What a caller may ask of the service at most; None is no limit of their own."""

    requests_per_minute: int | None = None
    max_queued: int | None = None


class Rate:
    """Counts the requests of every key. Safe to share between threads; with Redis it blocks: call it from a thread."""

    def __init__(self, redis_url: str | None, prefix: str) -> None:
        self._pool = None if redis_url is None else _pool(redis_url)
        self._window = SlidingWindowCounterRateLimiter(_storage(redis_url, self._pool, prefix))
        self._rest_until = float("-inf")
        self._silent_until = float("-inf")

    def count(self, key: str, per_minute: int) -> None:
        """One request more; TooManyRequests when it is one too many."""
        item = RateLimitItemPerMinute(per_minute)
        try:
            if time.monotonic() < self._rest_until or self._window.hit(item, key):
                return
            free = self._window.get_window_stats(item, key).reset_time - time.time()
        except (RedisError, OSError) as error:
            self._let_in(error)
            return
        metrics.REJECTED.labels("rate").inc()
        raise TooManyRequests(
            f"This key may send {per_minute} requests in a minute, and has: wait, then go on more slowly.",
            retry_after=max(1, math.ceil(free)),
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.disconnect()

    def _let_in(self, error: Exception) -> None:
        at = time.monotonic()
        self._rest_until = at + REST
        if at >= self._silent_until:
            self._silent_until = at + SILENCE
            log.warning("requests are not limited: Redis is down", extra={"error": type(error).__name__})


def _pool(redis_url: str) -> ConnectionPool:
    """Connections that say soon when nobody answers. One retry: a connection may have gone stale in the pool."""
    return ConnectionPool.from_url(
        redis_url,
        socket_timeout=PATIENCE,
        socket_connect_timeout=PATIENCE,
        retry=Retry(NoBackoff(), 1),
    )


def _storage(redis_url: str | None, pool: ConnectionPool | None, prefix: str) -> Storage:
    if redis_url is None or pool is None:
        return MemoryStorage()
    return RedisStorage(redis_url, connection_pool=pool, key_prefix=f"{prefix}:rate")
