"""Floods of values in request bodies, on every route with a JSON body: each costs little."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from api.errors import MAX_REPORTED_ERRORS
from service.kit import large_json
from tests.support.application import TestApp
from tests.support.hostile_bodies import JSON_PATHS, PUT_PATHS, SMALL_LIMIT, encode, floods, record_floods

SMALLER = SMALL_LIMIT // 8  #: bytes of the bodies whose memory is traced, which takes twenty times as long
FLOODS = {name: encode(body) for name, body in floods().items()}
SMALLER_FLOODS = {name: encode(body) for name, body in floods(SMALLER).items()}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Return a client of one application, for requests that are all refused."""
    test_app = TestApp(tmp_path_factory.mktemp("limits"))
    yield TestClient(test_app.app)
    test_app.close()


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize("name", FLOODS)
def test_hostile_bodies_are_refused_cheaply(shared_client: TestClient, path: str, name: str) -> None:
    """A body of up to a megabyte with a flood of values is refused with few errors, and with memory in proportion to
    its size."""
    raw, smaller = FLOODS[name], SMALLER_FLOODS[name]
    assert SMALLER < len(raw) < SMALL_LIMIT
    method = "PUT" if path in PUT_PATHS else "POST"
    answer = shared_client.request(method, path, content=raw, headers=JSON)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 10_000
    assert len(answer.json().get("errors", [])) <= MAX_REPORTED_ERRORS
    tracemalloc.start()
    try:
        shared_client.request(method, path, content=smaller, headers=JSON)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * SMALLER


@pytest.mark.parametrize("name", ["empty objects", "one record of keys", "nested lists", "escapes"])
def test_hostile_records_are_refused_cheaply(
    shared_client: TestClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A body above a megabyte with a flood of values, or with one huge text, is refused before it is parsed."""
    monkeypatch.setattr(large_json, "MAX_TOKENS", 30_000)  # counting takes long while memory is traced
    raw = record_floods(1_200_000)[name]
    tracemalloc.start()
    try:
        answer = shared_client.post("/evaluations", content=raw, headers=JSON)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code in (400, 413) and len(answer.content) < 1000
    assert peak < 8 * len(raw)  # the values of "empty objects" take 24 times as much
