"""Quotas of a key: tokens per minute, waiting calls, and what it has open at the same time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.errors import RateLimitExceeded
from api.quotas import ConcurrencyLimiter
from service.application.api_keys import ApiKeys
from service.application.caller import Caller, CallerLimits
from service.kit.ids import new_id
from tests.support.application import PROMPT, TOWER, TestApp
from tests.support.local_server import wait_until

PROMPT_TOKENS = -(-len(PROMPT) // 4)


def key_header(test_app: TestApp, **limits: int) -> dict[str, str]:
    """Create a key with limits and return its header."""
    name = new_id("key").lower().replace("_", "-")
    token = ApiKeys(test_app.database).create(name, ["read", "edit"], CallerLimits(**limits))[1]
    return {"Authorization": f"Bearer {token}"}


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": PROMPT, "max_new_tokens": 20}),
    ("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 20}),
    ("/compare", {"prompt": PROMPT, "max_new_tokens": 20}),
]


class TestTokensPerMinute:
    """The tokens that the calls of a key may need per minute."""

    @pytest.mark.parametrize(("path", "body"), CALLS)
    def test_tokens_are_counted(
        self, test_app: TestApp, client: TestClient, worker: Any, path: str, body: dict[str, Any]
    ) -> None:
        """A call beyond the quota gets 429 with `Retry-After` and is not sent; another key is not affected."""
        of_one = (PROMPT_TOKENS + 20) * (2 if path == "/compare" else 1)
        few = key_header(test_app, tokens_per_minute=2 * of_one)
        statuses = [client.post(path, json=body, headers=few).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = client.post(path, json=body, headers=few)
        assert int(refused.headers["retry-after"]) >= 1
        assert "tokens per minute" in refused.text
        assert len(worker.calls) == 2
        assert client.post(path, json=body, headers=key_header(test_app)).status_code == 200

    def test_cost_is_that_of_all_generations(self, test_app: TestApp, client: TestClient) -> None:
        """A request with many prompts uses the quota of as many requests; one above the whole quota gets 422."""
        few = key_header(test_app, tokens_per_minute=1000)
        body = {"prompts": [PROMPT] * 64, "max_new_tokens": 40}
        refused = client.post("/generate", json=body, headers=few)
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["field"] == "max_new_tokens"


def test_new_tokens_are_bounded_over_all_generations(tmp_path: Path) -> None:
    """`--max-new-tokens` bounds a request, not each of its generations."""
    test_app = TestApp(tmp_path, max_new_tokens=10)
    test_app.start_fake_worker()
    client = TestClient(test_app.app)
    body: dict[str, Any] = {"prompts": [PROMPT] * 5, "max_new_tokens": 2}
    assert client.post("/generate", json=body).status_code == 200
    for changes in ({"prompts": [PROMPT] * 6}, {"max_new_tokens": 3}):
        refused = client.post("/generate", json=body | changes)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "max_new_tokens")
    completion = {"model": "tiny", "prompt": [PROMPT] * 3, "n": 2, "max_tokens": 2}
    assert client.post("/v1/completions", json=completion).status_code == 400
    test_app.close()


class TestWaitingCalls:
    """How many calls of a key may wait. No worker runs, so every call waits."""

    @pytest.fixture
    def executor(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(8) as executor:
            yield executor

    def test_calls_of_one_key(
        self, test_app: TestApp, client: TestClient, executor: ThreadPoolExecutor
    ) -> None:
        """A key whose calls wait up to its limit gets 429; another key can send."""
        few, other = key_header(test_app, max_queued=2), key_header(test_app)
        body = {"prompt": PROMPT}
        waiting = [executor.submit(client.post, "/generate", json=body, headers=few) for _ in range(2)]
        wait_until(lambda: test_app.broker.queue_depth("generate") == 2)
        assert client.post("/generate", json=body, headers=few).status_code == 429
        waiting.append(executor.submit(client.post, "/generate", json=body, headers=other))
        wait_until(lambda: test_app.broker.queue_depth("generate") == 3)
        test_app.start_fake_worker()
        assert [answer.result(20).status_code for answer in waiting] == [200] * 3


class TestConcurrency:
    """What one key has open in a process."""

    def test_slots(self) -> None:
        """A caller has as many slots as its limit, apart from those of others; a closed one is free again."""
        limiter = ConcurrencyLimiter()
        few, other = Caller("few", CallerLimits(max_concurrent=2)), Caller("other")
        with limiter.slot(few), limiter.slot(few), limiter.slot(other):
            with pytest.raises(RateLimitExceeded), limiter.slot(few):
                pass
            with limiter.slot(other), limiter.slot(other):
                pass
        with limiter.slot(few), limiter.slot(few):
            pass
        assert not limiter._open

    def test_slot_is_free_after_an_error(self) -> None:
        """A slot whose request fails is free again."""
        limiter, few = ConcurrencyLimiter(), Caller("few", CallerLimits(max_concurrent=1))
        for _ in range(3):
            with pytest.raises(KeyError), limiter.slot(few):
                raise KeyError
        assert not limiter._open

    @pytest.mark.parametrize("stream", [True, False])
    def test_calls(self, test_app: TestApp, client: TestClient, stream: bool) -> None:
        """A call counts until its response is complete, as a stream or not; then the key can send another."""
        few = key_header(test_app, max_concurrent=1)
        body = {"prompt": PROMPT, "stream": stream}
        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(client.post, "/generate", json=body, headers=few)
            wait_until(lambda: test_app.broker.queue_depth("generate") == 1)
            refused = client.post("/generate", json=body, headers=few)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert client.get("/edits", headers=few).status_code == 200
            test_app.start_fake_worker()
            assert first.result(20).status_code == 200
        assert client.post("/generate", json=body, headers=few).status_code == 200
        assert not test_app.app.state.concurrency_limiter._open

    def test_event_streams(self, test_app: TestApp, client: TestClient) -> None:
        """An open stream of events counts; a refused one leaves the job unchanged."""
        few = key_header(test_app, max_concurrent=1)
        edit = client.post("/edits", json=TOWER, headers=few).json()
        opened = threading.Event()

        def listen() -> int:
            with client.stream("GET", f"/edits/{edit['id']}/events", headers=few) as answer:
                opened.set()
                return len(answer.read())

        with ThreadPoolExecutor(1) as executor:
            events = executor.submit(listen)
            wait_until(lambda: bool(test_app.app.state.concurrency_limiter._open))
            refused = client.get(f"/edits/{edit['id']}/events", headers=few)
            assert refused.status_code == 429
            test_app.start_fake_worker()
            assert events.result(20) > 0
        assert not test_app.app.state.concurrency_limiter._open

    def test_a_wait_without_a_slot_is_not_applied(self, test_app: TestApp, client: TestClient) -> None:
        """`Prefer: wait` of a key with too much open is ignored: the job is accepted and answered at once."""
        few = key_header(test_app, max_concurrent=1)
        body = {"prompt": PROMPT}
        with ThreadPoolExecutor(1) as executor:
            first = executor.submit(client.post, "/generate", json=body, headers=few)
            wait_until(lambda: test_app.broker.queue_depth("generate") == 1)
            answer = client.post("/edits", json=TOWER, headers={**few, "Prefer": "wait=30"})
            assert (answer.status_code, "preference-applied" in answer.headers) == (202, False)
            assert json.loads(answer.text)["status"] == "queued"
            test_app.start_fake_worker()
            assert first.result(20).status_code == 200


def test_work_is_queued_under_its_key(test_app: TestApp, client: TestClient) -> None:
    """Jobs wait under the actor of their key, at a cost that its weight divides."""
    light, heavy = key_header(test_app), key_header(test_app, weight=4)
    for headers in (light, heavy, light, heavy, light, heavy):
        client.post("/trace", json={"prompt": PROMPT, "subject": "Eiffel Tower"}, headers=headers)
    order = [delivery.caller for delivery in test_app.broker.receive(["trace"], 6, 0)]
    actors = {answer["actor"] for answer in client.get("/trace", headers=light).json()["items"]}
    assert set(order) == actors
    assert order.count(order[-1]) == 3 and order[-2:] == [order[-1]] * 2
