"""How often a key may ask, and what happens to who asks more often."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient

from api.errors import RateLimitExceeded
from api.rate_limits import OUTAGE_LOG_INTERVAL, RateLimiter
from service.application.api_keys import ApiKeys
from tests.support.application import TOWER, TestApp

UNREACHABLE_REDIS = "redis://127.0.0.1:1/0"


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, which stands still until it is set: a sliding minute begins with the clock's."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
def rate_limiter(request: pytest.FixtureRequest, frozen_time: list[float]) -> Iterator[RateLimiter]:
    """A count in each place where it may be kept."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    with closing(RateLimiter(url, "test")) as rate_limiter:
        yield rate_limiter


def count_allowed(rate_limiter: RateLimiter, key: str, per_minute: int, times: int) -> int:
    """How many of so many requests pass."""
    allowed = 0
    for _ in range(times):
        try:
            rate_limiter.check(key, per_minute)
            allowed += 1
        except RateLimitExceeded:
            pass
    return allowed


def test_a_key_passes_as_often_as_its_limit(rate_limiter: RateLimiter) -> None:
    """In a minute as many requests pass as the limit says, and no more."""
    assert count_allowed(rate_limiter, "key:a", 5, 20) == 5


def test_keys_do_not_share_their_limit(rate_limiter: RateLimiter) -> None:
    """What one key has used up is another's to use."""
    assert count_allowed(rate_limiter, "key:a", 3, 5) == 3
    assert count_allowed(rate_limiter, "key:b", 3, 5) == 3


def test_rejections_have_retry_after(rate_limiter: RateLimiter) -> None:
    """The wait is at least a second, and at most the minute."""
    count_allowed(rate_limiter, "key:a", 1, 1)
    with pytest.raises(RateLimitExceeded) as refused:
        rate_limiter.check("key:a", 1)
    assert 1 <= refused.value.retry_after <= 61
    assert "1 requests" in refused.value.detail


def test_a_refused_request_costs_nothing(frozen_time: list[float]) -> None:
    """Whoever kept knocking has the whole limit again two minutes later."""
    with closing(RateLimiter(None, "test")) as rate_limiter:
        count_allowed(rate_limiter, "key:a", 3, 1000)
        frozen_time[0] += 120
        assert count_allowed(rate_limiter, "key:a", 3, 9) == 3


def test_the_minute_slides(frozen_time: list[float]) -> None:
    """At the turn of a minute nobody gets twice the limit: what was used before it fades out within the next."""
    with closing(RateLimiter(None, "test")) as rate_limiter:
        frozen_time[0] -= frozen_time[0] % 60  # the minute begins
        frozen_time[0] += 59
        assert count_allowed(rate_limiter, "key:a", 60, 100) == 60
        frozen_time[0] += 2
        assert count_allowed(rate_limiter, "key:a", 60, 100) <= 2
        frozen_time[0] += 30
        assert 25 <= count_allowed(rate_limiter, "key:a", 60, 100) <= 31


@pytest.mark.servers
def test_processes_count_together(redis_url: str) -> None:
    """With Redis the limit is one for all processes of a service, and apart from another service's in the same Redis."""
    with (
        closing(RateLimiter(redis_url, "a")) as one,
        closing(RateLimiter(redis_url, "a")) as two,
        closing(RateLimiter(redis_url, "b")) as other,
    ):
        assert count_allowed(one, "key:a", 6, 4) + count_allowed(two, "key:a", 6, 4) == 6
        assert count_allowed(other, "key:a", 6, 4) == 4


@pytest.mark.servers
def test_counters_expire_in_redis(redis_url: str) -> None:
    """Nothing that is counted stays in Redis for ever, and it lies under the service's own prefix."""
    with closing(RateLimiter(redis_url, "mine")) as rate_limiter, closing(Redis.from_url(redis_url)) as redis:
        rate_limiter.check("key:a", 6)
        keys = redis.keys("*")
        assert keys
        assert all(key.startswith(b"mine:rate:") and 0 < redis.ttl(key) <= 120 for key in keys)


def test_when_redis_is_down_requests_are_allowed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are not worth an outage; one line a minute tells that they are off, and Redis is left alone meanwhile."""
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


@pytest.fixture
def limited_app(tmp_path: Path, frozen_time: list[float]) -> Iterator[TestApp]:
    test_app = TestApp(tmp_path, requests_per_minute=4, api_key="root")
    yield test_app
    test_app.close()


def send_requests(test_app: TestApp, token: str, times: int, path: str = "/edits") -> list[Any]:
    client = TestClient(test_app.app, headers={"Authorization": f"Bearer {token}"})
    return [client.get(path) for _ in range(times)]


def test_too_many_requests_are_429(limited_app: TestApp) -> None:
    """Above the service's limit a key gets a problem with `Retry-After`; the root key is no exception."""
    token = ApiKeys(limited_app.database).create("k", ["read"])[1]
    for good in (token, "root"):
        answers = send_requests(limited_app, good, 6)
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_a_key_may_have_its_own_limit(limited_app: TestApp) -> None:
    """What a key was made with goes before the service's default."""
    keys = ApiKeys(limited_app.database)
    less = keys.create("less", ["read"], requests_per_minute=2)[1]
    more = keys.create("more", ["read"], requests_per_minute=6)[1]
    assert [answer.status_code for answer in send_requests(limited_app, less, 3)] == [200, 200, 429]
    assert [answer.status_code for answer in send_requests(limited_app, more, 7)] == [200] * 6 + [429]


def test_forbidden_requests_count_too(limited_app: TestApp) -> None:
    """Trying doors is a request like another."""
    token = ApiKeys(limited_app.database).create("k", ["edit"])[1]
    assert [answer.status_code for answer in send_requests(limited_app, token, 6)] == [403] * 4 + [429] * 2


def test_a_wrong_key_uses_up_no_limit(limited_app: TestApp) -> None:
    """A wrong key costs no key anything."""
    keys = ApiKeys(limited_app.database)
    token = keys.create("k", ["read"])[1]
    wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
    assert {answer.status_code for answer in send_requests(limited_app, wrong, 9)} == {401}
    assert [answer.status_code for answer in send_requests(limited_app, token, 1)] == [200]


def test_a_key_may_leave_as_many_jobs_waiting_as_its_limit(test_app: TestApp, client: TestClient) -> None:
    """Of a key with room for two jobs a third is 429, whatever others have waiting; none of a batch too large is taken."""
    keys = ApiKeys(test_app.database)
    few = {"Authorization": f"Bearer {keys.create('few', ['edit'], max_queued=2)[1]}"}
    other = {"Authorization": f"Bearer {keys.create('other', ['edit', 'read'])[1]}"}
    assert client.post("/edits", json={"edits": [TOWER] * 3}, headers=few).status_code == 429
    assert client.post("/edits", json={"edits": [TOWER] * 2}, headers=few).status_code == 202
    refused = client.post("/edits", json=TOWER, headers=few)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/edits", json=TOWER, headers=other).status_code == 202
    assert len(client.get("/edits", headers=other).json()["items"]) == 3


def test_health_is_not_limited(limited_app: TestApp) -> None:
    """Whoever restarts processes may ask as often as needed."""
    assert {answer.status_code for answer in send_requests(limited_app, "root", 9, "/healthz")} == {200}


def test_without_a_key_nothing_is_counted(tmp_path: Path) -> None:
    """Limits are of keys: on loopback without one there is nobody to be protected from."""
    test_app = TestApp(tmp_path, requests_per_minute=1)
    client = TestClient(test_app.app)
    assert {client.get("/edits").status_code for _ in range(5)} == {200}
    test_app.close()
