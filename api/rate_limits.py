"""Rate limits per API key, of requests and of tokens: a sliding window of one minute, counted in Redis if there is one,
for all processes together.

Rate limits protect availability, not secrets: while Redis is down, requests are not limited.
"""

from __future__ import annotations

import logging
import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from api.errors import RateLimitExceeded

log = logging.getLogger(__name__)

REDIS_TIMEOUT = 1.0  #: timeout of Redis in seconds
REDIS_RETRY_INTERVAL = 5.0  #: seconds after a failure before Redis is used again
OUTAGE_LOG_INTERVAL = 60.0  #: seconds between log lines about an outage


class RateLimiter:
    """Counts requests by key. Thread-safe. With Redis it blocks: call it from a thread."""

    def __init__(self, redis_url: str | None, prefix: str) -> None:
        self._pool = None if redis_url is None else _connection_pool(redis_url)
        self._limiter = SlidingWindowCounterRateLimiter(_storage(redis_url, self._pool, prefix))
        self._redis_retry_at = float("-inf")
        self._next_outage_log_at = float("-inf")

    def check(self, caller: str, per_minute: int) -> None:
        """Count a request. Raises RateLimitExceeded if it exceeds the limit."""
        self._count(caller, per_minute, 1, f"This API key may send {per_minute} requests per minute")

    def check_tokens(self, caller: str, per_minute: int, tokens: int) -> None:
        """Count the tokens that a request may need. Raises RateLimitExceeded if they exceed the quota."""
        detail = f"This API key may use {per_minute} tokens per minute, and this request may need {tokens}"
        self._count(f"tokens:{caller}", per_minute, tokens, detail)

    def _count(self, key: str, per_minute: int, cost: int, detail: str) -> None:
        item = RateLimitItemPerMinute(per_minute)
        try:
            if time.monotonic() < self._redis_retry_at or self._limiter.hit(item, key, cost=cost):
                return
            reset_in = self._limiter.get_window_stats(item, key).reset_time - time.time()
        except (RedisError, OSError) as error:
            self._allow_without_redis(error)
            return
        raise RateLimitExceeded(
            f"{detail}: wait before the next request.", retry_after=max(1, math.ceil(reset_in))
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.disconnect()

    def _allow_without_redis(self, error: Exception) -> None:
        current_time = time.monotonic()
        self._redis_retry_at = current_time + REDIS_RETRY_INTERVAL
        if current_time >= self._next_outage_log_at:
            self._next_outage_log_at = current_time + OUTAGE_LOG_INTERVAL
            log.warning("requests are not limited: Redis is down", extra={"error": type(error).__name__})


def _connection_pool(redis_url: str) -> ConnectionPool:
    """Return a pool with short timeouts. One retry, because a pooled connection may be stale."""
    return ConnectionPool.from_url(
        redis_url,
        socket_timeout=REDIS_TIMEOUT,
        socket_connect_timeout=REDIS_TIMEOUT,
        retry=Retry(NoBackoff(), 1),
    )


def _storage(redis_url: str | None, pool: ConnectionPool | None, prefix: str) -> Storage:
    if redis_url is None or pool is None:
        return MemoryStorage()
    return RedisStorage(redis_url, connection_pool=pool, key_prefix=f"{prefix}:rate")
