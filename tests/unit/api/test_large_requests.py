"""Large requests: one is worked on at a time, callers take turns, and answers do not wait for jobs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api import job_submission, received_body
from api.errors import TooManyUploads, encode_json
from api.large_requests import MAX_UPLOADS, LargeRequests
from service.schemas import EditListRequest, EditRequest, EvaluationRequest, TraceRequest
from tests.support.application import TOWER, FakeWorker, TestApp
from tests.support.hostile_bodies import largest_records

JSON = {"content-type": "application/json"}


def test_callers_take_turns() -> None:
    """With many large requests of one caller waiting, one of another caller is second."""

    async def run() -> list[str]:
        large, order = LargeRequests(), []

        async def work(caller: str, name: str) -> None:
            async with large.slot(caller):
                order.append(name)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            for number in range(5):
                tasks.create_task(work("alice", f"alice {number}"))
            await asyncio.sleep(0)
            tasks.create_task(work("bob", "bob"))
        return order

    assert asyncio.run(run()) == ["alice 0", "bob", "alice 1", "alice 2", "alice 3", "alice 4"]


def test_one_request_holds_the_slot() -> None:
    """The slot is held by one request at a time, whoever sends it, and is free after an error."""

    async def run() -> int:
        large = LargeRequests()
        active = most = 0

        async def work(number: int) -> None:
            nonlocal active, most
            async with large.slot(f"caller {number % 3}"):
                active += 1
                most = max(most, active)
                await asyncio.sleep(0)
                active -= 1
                if number % 2:
                    raise ValueError

        await asyncio.gather(*(work(number) for number in range(12)), return_exceptions=True)
        return most

    assert asyncio.run(run()) == 1


def test_uploads_of_a_caller_are_limited() -> None:
    """A caller has a maximum number of uploads; those of another caller and ended ones do not count."""
    large = LargeRequests()
    with ExitStack() as stack:
        for _ in range(MAX_UPLOADS):
            stack.enter_context(large.upload("alice"))
        with large.upload("bob"), pytest.raises(TooManyUploads), large.upload("alice"):
            pass
    with large.upload("alice"):
        pass


def test_refused_upload_says_when_to_retry(
    test_app: TestApp, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large request beyond the maximum is 429 with `Retry-After`; a small one is accepted."""
    monkeypatch.setattr("api.large_requests.MAX_UPLOADS", 0)
    answer = client.post("/evaluations", content=largest_records(1_400_000, 100), headers=JSON)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["code"] == "too_many_uploads"
    assert client.post("/edits", json=TOWER).status_code == 202


def test_large_request_does_not_wait_for_its_job(
    test_app: TestApp, client: TestClient, worker: FakeWorker
) -> None:
    """A request with a body above a megabyte is answered when its job is queued, whatever it prefers."""
    worker.may_finish.clear()
    records = [{**TOWER, "paraphrases": ["The {} is in"] * 1000}] * 70
    body = json.dumps({"records": records}).encode()
    assert len(body) > received_body.MAX_IN_MEMORY
    answer = client.post("/evaluations", content=body, headers=JSON | {"Prefer": "wait=60"})
    assert answer.status_code == 202 and "preference-applied" not in answer.headers
    worker.may_finish.set()


def test_large_body_is_kept_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: TestClient
) -> None:
    """A body above a megabyte is kept in a file that is gone afterwards, and gives the same answer."""
    kept: list[Any] = []
    folder = tmp_path / "bodies"
    folder.mkdir()
    receive = tempfile.TemporaryFile

    def record_file() -> Any:
        kept.append(receive(dir=folder))
        return kept[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", record_file)
    text = "x" * received_body.MAX_IN_MEMORY
    answer = client.post("/evaluations", content=b'{"records":["' + text.encode() + b'"]}', headers=JSON)
    assert answer.status_code == 413
    assert len(kept) == 1 and kept[0].closed and not list(folder.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        EditRequest(**TOWER),
        EditListRequest(edits=[EditRequest(**TOWER), EditRequest(**TOWER, probes={"paraphrase": ["é {}"]})]),
        EvaluationRequest(records=[TOWER, {"a": [1, 2.5, None]}], strengths=[0.5, 1.0]),
        EvaluationRequest(dataset="facts"),
        TraceRequest(subject="a", prompt="a b", kinds=["mlp"]),
    ],
    ids=lambda body: type(body).__name__,
)
def test_digest_of_a_request_is_that_of_its_json(body: Any) -> None:
    """The digest for the idempotency key, which is computed in pieces, is that of the whole JSON."""
    whole = encode_json({"kind": "x", "body": body.model_dump(mode="json")})
    pieces = b"".join(job_submission._json_pieces("x", body))
    assert hashlib.sha256(pieces).digest() == hashlib.sha256(whole).digest()
