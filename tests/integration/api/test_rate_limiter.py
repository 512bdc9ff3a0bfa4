"""The rate limiter: a sliding minute, counted in the process or in Redis."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from redis import Redis

from api.errors import RateLimitExceeded
from api.rate_limits import OUTAGE_LOG_INTERVAL, RateLimiter

UNREACHABLE_REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time of day in a list; it is constant until a test changes it, so that a minute does not end within a
    test."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture(params=["memory", "redis"])
def rate_limiter(request: pytest.FixtureRequest, frozen_time: list[float]) -> Iterator[RateLimiter]:
    """Return a rate limiter for each place where requests are counted."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    with closing(RateLimiter(url, "test")) as rate_limiter:
        yield rate_limiter


def count_allowed(rate_limiter: RateLimiter, key: str, per_minute: int, times: int) -> int:
    """Return how many of `times` requests pass."""
    allowed = 0
    for _ in range(times):
        try:
            rate_limiter.check(key, per_minute)
            allowed += 1
        except RateLimitExceeded:
            pass
    return allowed


def test_requests_pass_up_to_the_limit(rate_limiter: RateLimiter) -> None:
    """Within a minute exactly `per_minute` requests of a key pass."""
    assert count_allowed(rate_limiter, "key:a", 5, 20) == 5


def test_keys_have_separate_limits(rate_limiter: RateLimiter) -> None:
    """Each key has a limit of its own."""
    assert count_allowed(rate_limiter, "key:a", 3, 5) == 3
    assert count_allowed(rate_limiter, "key:b", 3, 5) == 3


def test_rejections_have_retry_after(rate_limiter: RateLimiter) -> None:
    """`retry_after` is between 1 and 61 seconds."""
    count_allowed(rate_limiter, "key:a", 1, 1)
    with pytest.raises(RateLimitExceeded) as refused:
        rate_limiter.check("key:a", 1)
    assert 1 <= refused.value.retry_after <= 61
    assert "1 requests" in refused.value.detail


def test_rejected_requests_do_not_count(frozen_time: list[float]) -> None:
    """Rejected requests do not count: two minutes later the whole limit is available."""
    with closing(RateLimiter(None, "test")) as rate_limiter:
        count_allowed(rate_limiter, "key:a", 3, 1000)
        frozen_time[0] += 120
        assert count_allowed(rate_limiter, "key:a", 3, 9) == 3


def test_limit_holds_across_a_clock_minute(frozen_time: list[float]) -> None:
    """The limit holds across the end of a clock minute: earlier requests are discounted gradually."""
    with closing(RateLimiter(None, "test")) as rate_limiter:
        frozen_time[0] -= frozen_time[0] % 60  # the minute begins
        frozen_time[0] += 59
        assert count_allowed(rate_limiter, "key:a", 60, 100) == 60
        frozen_time[0] += 2
        assert count_allowed(rate_limiter, "key:a", 60, 100) <= 2
        frozen_time[0] += 30
        assert 25 <= count_allowed(rate_limiter, "key:a", 60, 100) <= 31


def test_processes_share_the_count_in_redis(redis_url: str) -> None:
    """With Redis, all processes of a service share one count; another prefix has a count of its own."""
    with (
        closing(RateLimiter(redis_url, "a")) as one,
        closing(RateLimiter(redis_url, "a")) as two,
        closing(RateLimiter(redis_url, "b")) as other,
    ):
        assert count_allowed(one, "key:a", 6, 4) + count_allowed(two, "key:a", 6, 4) == 6
        assert count_allowed(other, "key:a", 6, 4) == 4


def test_counters_expire_in_redis(redis_url: str) -> None:
    """Every key in Redis has the prefix of the service and expires within 120 seconds."""
    with (
        closing(RateLimiter(redis_url, "mine")) as rate_limiter,
        closing(Redis.from_url(redis_url, decode_responses=True)) as redis,
    ):
        rate_limiter.check("key:a", 6)
        keys = [str(key) for key in redis.keys("*")]
        assert keys
        assert all(key.startswith("mine:rate:") and 0 < redis.ttl(key) <= 120 for key in keys)


def test_when_redis_is_down_requests_are_allowed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis is unreachable, requests pass, and one warning per minute reports it."""
    monotonic_time = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic_time[0])
    with caplog.at_level(logging.WARNING), closing(RateLimiter(UNREACHABLE_REDIS, "test")) as rate_limiter:
        for _ in range(12):  # a minute
            assert count_allowed(rate_limiter, "key:a", 1, 3) == 3
            monotonic_time[0] += OUTAGE_LOG_INTERVAL / 12
        assert len(caplog.records) == 1
        assert count_allowed(rate_limiter, "key:a", 1, 3) == 3
        assert len(caplog.records) == 2
    assert UNREACHABLE_REDIS not in caplog.text
