"""Export and import over HTTP, on each wiring: api.routes.exports."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import InvalidInput
from service.kit.safetensors_io import read
from tests.support.application import EXPORTED, NOWHERE, TOWER, FakeWorker, House

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def edited(client: TestClient, worker: FakeWorker) -> dict[str, Any]:
    """An edit that has landed as version 1."""
    return client.post("/edits", json=TOWER, headers={"Prefer": "wait=20"}).json()  # type: ignore[no-any-return]


def test_the_answer_is_held_until_the_file_is_there(client: TestClient, edited: dict[str, Any]) -> None:
    """And has a name that says what it is."""
    answer = client.get("/export")
    assert (answer.status_code, answer.content) == (200, b"".join(EXPORTED))
    assert answer.headers["content-disposition"] == 'attachment; filename="tiny-v1-peft.zip"'
    assert answer.headers["content-type"] == "application/zip"
    assert client.get("/export", params={"version": 1}).content == answer.content
    (job,) = client.get("/jobs", params={"kind": "export"}).json()["items"]
    assert job["links"]["self"] == "/export?version=1&format=peft"
    assert client.get(job["links"]["self"]).content == answer.content


def test_who_will_not_wait_is_told_to_come_back(
    client: TestClient, worker: FakeWorker, edited: dict[str, Any]
) -> None:
    """202 with the export's course; the file when it is asked for again."""
    worker.go.clear()
    answer = client.get("/export", headers={"Prefer": "wait=0"})
    assert answer.status_code == 202 and answer.json()["status"] in ("queued", "running")
    assert int(answer.headers["retry-after"]) >= 1
    worker.go.set()
    assert client.get(answer.json()["links"]["self"]).status_code == 200


def test_edits_are_handed_out_without_a_worker(
    client: TestClient, edited: dict[str, Any], house: House
) -> None:
    """All that is needed is in the database; what is told of them is in the file."""
    answer = client.get("/export", params={"format": "edits", "version": "head"})
    assert answer.headers["content-disposition"] == 'attachment; filename="version-1.edits.safetensors"'
    assert answer.headers["content-type"] == "application/octet-stream"
    found = read(answer.content, "it")
    assert bytes(found.data[edited["id"]]) == b"factors of " + edited["id"].encode()
    assert '"Eiffel Tower"' in found.metadata["set"]


def test_nobody_there_to_make_it(client: TestClient, house: House) -> None:
    """503 at once, rather than an answer that is held for ever."""
    house.hire()
    client.post("/edits", json=TOWER, headers={"Prefer": "wait=20"})
    house.desk.leave()
    answer = client.get("/export")
    assert answer.status_code == 503 and "edit" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"version": 7}, "version"),
        ({"version": "x"}, "version"),
        ({"version": 0}, "version"),
        ({"format": "x"}, "format"),
    ],
)
def test_what_cannot_be_exported(
    client: TestClient, edited: dict[str, Any], asked: dict[str, Any], field: str
) -> None:
    """An unknown version or form, and a version without edits."""
    answer = client.get("/export", params=asked)
    assert answer.status_code == 422 and field in str(answer.json())


def test_a_failed_export_says_why(client: TestClient, worker: FakeWorker, edited: dict[str, Any]) -> None:
    """What a worker says against an export of this version is 409, a fault of its own 500; whoever asks next has another chance."""
    worker.unable = InvalidInput("the edited weights are too large: make them elsewhere.")
    answer = client.get("/export")
    assert answer.status_code == 409 and answer.json()["detail"] == worker.unable.detail
    worker.unable = "out of memory"
    assert client.get("/export").status_code == 500
    worker.unable = None
    assert client.get("/export").status_code == 200


def test_a_file_of_edits_is_read(client: TestClient, edited: dict[str, Any]) -> None:
    """At home its edits are known; what is damaged is refused in words."""
    data = client.get("/export", params={"format": "edits"}).content
    answer = client.post("/import", content=data[:-1] + b"x", headers=BINARY)
    assert answer.status_code == 422 and "damaged" in answer.json()["detail"]
    answer = client.post("/import", content=b"", headers=BINARY)
    assert answer.status_code == 422


def test_an_import_is_declared_as_a_file(client: TestClient) -> None:
    """A browser asks before it sends that to another origin, as with JSON: no page can import behind its user's back."""
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}):
        assert client.post("/import", content=b"x", headers=headers).status_code == 415


def test_an_import_may_be_larger_than_other_bodies(client: TestClient, house: House) -> None:
    """Up to a limit of its own."""
    large = b"x" * (house.settings.max_body + 1)
    assert client.post("/import", content=large, headers=BINARY).status_code == 422


def test_only_who_may_edit_may_import(client: TestClient, house: House) -> None:
    """An export is for everyone who reads."""
    keys = client.app.state.keys  # type: ignore[attr-defined]
    _, token = keys.create("reader", ["read"])
    bearer = {"Authorization": f"Bearer {token}"}
    answer = client.post("/import", content=b"x", headers=BINARY | bearer)
    assert answer.status_code == 403 and "`edit`" in answer.json()["detail"]
    assert client.get("/export", headers=bearer).status_code in (422, 503)


def test_edits_that_fail_are_no_part_of_it(client: TestClient, edited: dict[str, Any]) -> None:
    """Only what is active is."""
    client.post("/edits", json=TOWER | {"target_new": NOWHERE}, headers={"Prefer": "wait=20"})
    data = client.get("/export", params={"format": "edits"}).content
    assert list(read(data, "it").data) == [edited["id"]]
