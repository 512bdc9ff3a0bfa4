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

from api.errors import TooManyRequests
from api.rate_limits import SILENCE, Rate
from service.application.api_keys import Keys
from tests.support.application import TOWER, House

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, which stands still until it is set: a sliding minute begins with the clock's."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers)])
def rate(request: pytest.FixtureRequest, at: list[float]) -> Iterator[Rate]:
    """A count in each place where it may be kept."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    with closing(Rate(url, "test")) as counting:
        yield counting


def passed(rate: Rate, key: str, per_minute: int, times: int) -> int:
    """How many of so many requests pass."""
    count = 0
    for _ in range(times):
        try:
            rate.count(key, per_minute)
            count += 1
        except TooManyRequests:
            pass
    return count


def test_a_key_passes_as_often_as_its_limit(rate: Rate) -> None:
    """In a minute as many requests pass as the limit says, and no more."""
    assert passed(rate, "key:a", 5, 20) == 5


def test_keys_do_not_share_their_limit(rate: Rate) -> None:
    """What one key has used up is another's to use."""
    assert passed(rate, "key:a", 3, 5) == 3
    assert passed(rate, "key:b", 3, 5) == 3


def test_who_is_refused_is_told_when_to_come_back(rate: Rate) -> None:
    """The wait is at least a second, and at most the minute."""
    passed(rate, "key:a", 1, 1)
    with pytest.raises(TooManyRequests) as refused:
        rate.count("key:a", 1)
    assert 1 <= refused.value.retry_after <= 61
    assert "1 requests" in refused.value.detail


def test_a_refused_request_costs_nothing(at: list[float]) -> None:
    """Whoever kept knocking has the whole limit again two minutes later."""
    with closing(Rate(None, "test")) as rate:
        passed(rate, "key:a", 3, 1000)
        at[0] += 120
        assert passed(rate, "key:a", 3, 9) == 3


def test_the_minute_slides(at: list[float]) -> None:
    """At the turn of a minute nobody gets twice the limit: what was used before it fades out within the next."""
    with closing(Rate(None, "test")) as rate:
        at[0] -= at[0] % 60  # the minute begins
        at[0] += 59
        assert passed(rate, "key:a", 60, 100) == 60
        at[0] += 2
        assert passed(rate, "key:a", 60, 100) <= 2
        at[0] += 30
        assert 25 <= passed(rate, "key:a", 60, 100) <= 31


@pytest.mark.servers
def test_processes_count_together(redis_url: str) -> None:
    """With Redis the limit is one for all processes of a service, and apart from another service's in the same Redis."""
    with (
        closing(Rate(redis_url, "a")) as one,
        closing(Rate(redis_url, "a")) as two,
        closing(Rate(redis_url, "b")) as other,
    ):
        assert passed(one, "key:a", 6, 4) + passed(two, "key:a", 6, 4) == 6
        assert passed(other, "key:a", 6, 4) == 4


@pytest.mark.servers
def test_counts_go_away_by_themselves(redis_url: str) -> None:
    """Nothing that is counted stays in Redis for ever, and it lies under the service's own prefix."""
    with closing(Rate(redis_url, "mine")) as rate, closing(Redis.from_url(redis_url)) as redis:
        rate.count("key:a", 6)
        kept = redis.keys("*")
        assert kept
        assert all(key.startswith(b"mine:rate:") and 0 < redis.ttl(key) <= 120 for key in kept)


def test_when_redis_is_down_everybody_passes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are not worth an outage; one line a minute tells that they are off, and Redis is left alone meanwhile."""
    passing = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: passing[0])
    with caplog.at_level(logging.WARNING), closing(Rate(NOWHERE, "test")) as rate:
        for _ in range(12):  # a minute
            assert passed(rate, "key:a", 1, 3) == 3
            passing[0] += SILENCE / 12
        assert len(caplog.records) == 1
        assert passed(rate, "key:a", 1, 3) == 3
        assert len(caplog.records) == 2
    assert NOWHERE not in caplog.text


@pytest.fixture
def limited(tmp_path: Path, at: list[float]) -> Iterator[House]:
    house = House(tmp_path, requests_per_minute=4, api_key="root")
    yield house
    house.close()


def asked(house: House, token: str, times: int, path: str = "/edits") -> list[Any]:
    client = TestClient(house.app, headers={"Authorization": f"Bearer {token}"})
    return [client.get(path) for _ in range(times)]


def test_too_many_requests_are_429(limited: House) -> None:
    """Above the service's limit a key gets a problem with `Retry-After`; the root key is no exception."""
    token = Keys(limited.database).create("k", ["read"])[1]
    for good in (token, "root"):
        answers = asked(limited, good, 6)
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_a_key_may_have_its_own_limit(limited: House) -> None:
    """What a key was made with goes before the service's default."""
    keys = Keys(limited.database)
    less = keys.create("less", ["read"], requests_per_minute=2)[1]
    more = keys.create("more", ["read"], requests_per_minute=6)[1]
    assert [answer.status_code for answer in asked(limited, less, 3)] == [200, 200, 429]
    assert [answer.status_code for answer in asked(limited, more, 7)] == [200] * 6 + [429]


def test_what_a_key_may_not_do_counts_too(limited: House) -> None:
    """Trying doors is a request like another."""
    token = Keys(limited.database).create("k", ["edit"])[1]
    assert [answer.status_code for answer in asked(limited, token, 6)] == [403] * 4 + [429] * 2


def test_a_stranger_uses_up_nobodys_limit(limited: House) -> None:
    """A wrong key costs no key anything."""
    keys = Keys(limited.database)
    token = keys.create("k", ["read"])[1]
    wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
    assert {answer.status_code for answer in asked(limited, wrong, 9)} == {401}
    assert [answer.status_code for answer in asked(limited, token, 1)] == [200]


def test_a_key_may_leave_as_many_jobs_waiting_as_its_limit(house: House, client: TestClient) -> None:
    """Of a key with room for two jobs a third is 429, whatever others have waiting; none of a batch too large is taken."""
    keys = Keys(house.database)
    few = {"Authorization": f"Bearer {keys.create('few', ['edit'], max_queued=2)[1]}"}
    other = {"Authorization": f"Bearer {keys.create('other', ['edit', 'read'])[1]}"}
    assert client.post("/edits", json={"edits": [TOWER] * 3}, headers=few).status_code == 429
    assert client.post("/edits", json={"edits": [TOWER] * 2}, headers=few).status_code == 202
    refused = client.post("/edits", json=TOWER, headers=few)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/edits", json=TOWER, headers=other).status_code == 202
    assert len(client.get("/edits", headers=other).json()["items"]) == 3


def test_health_is_not_limited(limited: House) -> None:
    """Whoever restarts processes may ask as often as needed."""
    assert {answer.status_code for answer in asked(limited, "root", 9, "/healthz")} == {200}


def test_without_a_key_nothing_is_counted(tmp_path: Path) -> None:
    """Limits are of keys: on loopback without one there is nobody to be protected from."""
    house = House(tmp_path, requests_per_minute=1)
    client = TestClient(house.app)
    assert {client.get("/edits").status_code for _ in range(5)} == {200}
    house.close()
