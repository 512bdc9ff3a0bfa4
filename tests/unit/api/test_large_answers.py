"""Large answers are encoded in a thread, and pages of large jobs are short."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from api import large_answers
from api.large_answers import MAX_INLINE_SIZE, is_large
from api.large_requests import LargeRequests
from service.db.database import Database
from service.jobs import page
from tests.support.application import TOWER, TestApp


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": "x" * 100, "b": [1] * 100}, False),
        ("x" * MAX_INLINE_SIZE, True),
        ({"a": [{"b": ["x" * MAX_INLINE_SIZE]}]}, True),
        ([0] * MAX_INLINE_SIZE, True),
        ([[]] * MAX_INLINE_SIZE, True),
    ],
    ids=["small", "text", "nested text", "numbers", "lists"],
)
def test_size_of_an_answer(value: Any, expected: bool) -> None:
    """Texts, numbers and lists count, wherever they are."""
    assert is_large(value) is expected


def test_large_answer_is_the_same(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is encoded in a thread has the same status, headers and JSON as one that is not."""
    threads = []
    encode = large_answers._encode

    def record_thread(*arguments: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return encode(*arguments)

    monkeypatch.setattr(large_answers, "_encode", record_thread)
    headers = {"Idempotency-Key": "k", "Prefer": "wait=0"}
    answers = []
    for maximum in (MAX_INLINE_SIZE, 0):
        monkeypatch.setattr(large_answers, "MAX_INLINE_SIZE", maximum)
        answers.append(client.post("/edits", json=TOWER, headers=headers))
    small, large = answers
    assert len(threads) == 1 and "worker" in threads[0].lower()
    assert (large.status_code, large.json()) == (small.status_code, small.json())
    assert {**large.headers, "x-request-id": ""} == {**small.headers, "x-request-id": ""}


def test_page_ends_at_its_size(
    test_app: TestApp, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of large jobs ends before its number of items, has one in any case, and the next one follows."""
    edits = [TOWER | {"subject": f"Tower {n}", "prompt": "{} is in"} for n in range(5)]
    created = client.post("/edits", json={"edits": edits}).json()["items"]
    for size, lengths in ((0, [1, 1, 1, 1, 1]), (10_000_000, [5])):
        monkeypatch.setattr(page, "MAX_PAGE_SIZE", size)
        found, cursor, pages = [], None, []
        while True:
            answer = client.get(
                "/edits", params={"limit": 200} | ({"cursor": cursor} if cursor else {})
            ).json()
            found += [item["id"] for item in answer["items"]]
            pages.append(len(answer["items"]))
            if (cursor := answer["next"]) is None:
                break
        assert pages == lengths and found == [edit["id"] for edit in reversed(created)]


@pytest.mark.parametrize("path", ["/edits", "/edits/{id}", "/ledger", "/ledger/verify"])
def test_few_answers_of_a_route_are_read_at_once(
    http_client: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Of many requests for one resource or list, with one caller, one at a time reads the database."""
    edit = http_client.post("/edits", json=TOWER).json()
    active = most = 0
    method = "dedicated_read_session" if path == "/ledger/verify" else "read_session"
    read = getattr(Database, method)

    @contextmanager
    def count_sessions(database: Database, **options: Any) -> Iterator[Any]:
        nonlocal active, most
        with read(database, **options) as session:
            active += 1
            most = max(most, active)
            time.sleep(0.01)  # longer than it takes to receive the other requests
            active -= 1
            yield session

    monkeypatch.setattr(Database, method, count_sessions)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(http_client.get, [path.format(id=edit["id"])] * 16))
    assert {answer.status_code for answer in answers} == {200}
    assert most == 1


def test_answer_slots_are_those_of_a_route() -> None:
    """A route whose slots are taken does not delay another route, and callers take turns."""

    async def run() -> list[str]:
        large, order = LargeRequests(), []

        async def answer(route: str, caller: str) -> None:
            async with large.answer_slot(route, caller):
                order.append(f"{route} {caller}")
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as tasks:
            for caller in ("a", "a", "b", "c"):
                tasks.create_task(answer("slow", caller))
            await asyncio.sleep(0)
            tasks.create_task(answer("other", "a"))
        return order

    assert asyncio.run(run()) == ["slow a", "slow b", "other a", "slow c", "slow a"]
