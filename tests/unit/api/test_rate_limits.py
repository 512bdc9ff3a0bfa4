"""Rate limits and queue limits of API keys, as HTTP responses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.application.api_keys import ApiKeys
from service.application.caller import CallerLimits
from service.kit import metrics
from tests.support.application import TOWER, TestApp


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time of day in a list. It is constant unless a test changes it, so no minute ends within a
    test."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture
def limited_app(tmp_path: Path, frozen_time: list[float]) -> Iterator[TestApp]:
    test_app = TestApp(tmp_path, requests_per_minute=4, api_key="root-key-of-tests")
    yield test_app
    test_app.close()


def send_requests(test_app: TestApp, token: str, times: int, path: str = "/edits") -> list[Any]:
    client = TestClient(test_app.app, headers={"Authorization": f"Bearer {token}"})
    return [client.get(path) for _ in range(times)]


def test_too_many_requests_are_429(limited_app: TestApp) -> None:
    """Requests above the limit get 429 with `Retry-After`, also with the root key."""
    token = ApiKeys(limited_app.database).create("k", ["read"])[1]
    for good in (token, "root-key-of-tests"):
        answers = send_requests(limited_app, good, 6)
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_a_key_may_have_its_own_limit(limited_app: TestApp) -> None:
    """The limits of a key override the defaults of the settings."""
    keys = ApiKeys(limited_app.database)
    less = keys.create("less", ["read"], CallerLimits(requests_per_minute=2))[1]
    more = keys.create("more", ["read"], CallerLimits(requests_per_minute=6))[1]
    assert [answer.status_code for answer in send_requests(limited_app, less, 3)] == [200, 200, 429]
    assert [answer.status_code for answer in send_requests(limited_app, more, 7)] == [200] * 6 + [429]


def test_rejected_request_is_counted_once(limited_app: TestApp) -> None:
    """Each 429 adds one to the metric of rejected requests."""
    counter = metrics.HTTP_REJECTED.labels("rate")
    before = counter._value.get()
    send_requests(limited_app, "root-key-of-tests", 7)
    assert counter._value.get() == before + 3


def test_forbidden_requests_count_too(limited_app: TestApp) -> None:
    """Requests that get 403 count towards the limit."""
    token = ApiKeys(limited_app.database).create("k", ["edit"])[1]
    assert [answer.status_code for answer in send_requests(limited_app, token, 6)] == [403] * 4 + [429] * 2


def test_a_wrong_key_uses_up_no_limit(limited_app: TestApp) -> None:
    """Requests with an invalid key do not count towards the limit of another key."""
    keys = ApiKeys(limited_app.database)
    token = keys.create("k", ["read"])[1]
    wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
    assert {answer.status_code for answer in send_requests(limited_app, wrong, 9)} == {401}
    assert [answer.status_code for answer in send_requests(limited_app, token, 1)] == [200]


def test_a_key_may_leave_as_many_jobs_waiting_as_its_limit(test_app: TestApp, client: TestClient) -> None:
    """A key with a limit of two queued jobs gets 429 for a third. A batch above the limit is rejected as a
    whole. Other keys are not affected."""
    keys = ApiKeys(test_app.database)
    few = {"Authorization": f"Bearer {keys.create('few', ['edit'], CallerLimits(max_queued=2))[1]}"}
    other = {"Authorization": f"Bearer {keys.create('other', ['edit', 'read'])[1]}"}
    assert client.post("/edits", json={"edits": [TOWER] * 3}, headers=few).status_code == 429
    assert client.post("/edits", json={"edits": [TOWER] * 2}, headers=few).status_code == 202
    refused = client.post("/edits", json=TOWER, headers=few)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/edits", json=TOWER, headers=other).status_code == 202
    assert len(client.get("/edits", headers=other).json()["items"]) == 3


def test_health_is_not_limited(limited_app: TestApp) -> None:
    """Health routes are not limited."""
    assert {
        answer.status_code for answer in send_requests(limited_app, "root-key-of-tests", 9, "/healthz")
    } == {200}


def test_without_a_key_nothing_is_counted(tmp_path: Path) -> None:
    """Requests on loopback without an API key are not limited."""
    test_app = TestApp(tmp_path, requests_per_minute=1)
    client = TestClient(test_app.app)
    assert {client.get("/edits").status_code for _ in range(5)} == {200}
    test_app.close()
