"""Export and import over HTTP, on each wiring: api.routes.exports."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import InvalidInput
from service.kit.safetensors_io import read_safetensors
from tests.support.application import EXPORT_CHUNKS, FAILING_OBJECT, TOWER, FakeWorker, TestApp

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def applied_edit(client: TestClient, worker: FakeWorker) -> dict[str, Any]:
    """An edit that has landed as version 1."""
    return client.post("/edits", json=TOWER, headers={"Prefer": "wait=20"}).json()  # type: ignore[no-any-return]


def test_export_waits_for_the_file(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """And has a name that says what it is."""
    answer = client.get("/export")
    assert (answer.status_code, answer.content) == (200, b"".join(EXPORT_CHUNKS))
    assert answer.headers["content-disposition"] == 'attachment; filename="tiny-v1-peft.zip"'
    assert answer.headers["content-type"] == "application/zip"
    assert client.get("/export", params={"version": 1}).content == answer.content
    (job,) = client.get("/jobs", params={"kind": "export"}).json()["items"]
    assert job["links"]["self"] == "/export?version=1&format=peft"
    assert client.get(job["links"]["self"]).content == answer.content


def test_export_without_waiting_is_202(
    client: TestClient, worker: FakeWorker, applied_edit: dict[str, Any]
) -> None:
    """202 with the export's course; the file when it is asked for again."""
    worker.may_finish.clear()
    answer = client.get("/export", headers={"Prefer": "wait=0"})
    assert answer.status_code == 202 and answer.json()["status"] in ("queued", "running")
    assert int(answer.headers["retry-after"]) >= 1
    worker.may_finish.set()
    assert client.get(answer.json()["links"]["self"]).status_code == 200


def test_an_edit_set_is_exported_without_a_worker(
    client: TestClient, applied_edit: dict[str, Any], test_app: TestApp
) -> None:
    """All that is needed is in the database; what is told of them is in the file."""
    answer = client.get("/export", params={"format": "edits", "version": "head"})
    assert answer.headers["content-disposition"] == 'attachment; filename="version-1.edits.safetensors"'
    assert answer.headers["content-type"] == "application/octet-stream"
    exported = read_safetensors(answer.content, "it")
    assert bytes(exported.data[applied_edit["id"]]) == b"factors of " + applied_edit["id"].encode()
    assert '"Eiffel Tower"' in exported.metadata["set"]


def test_export_without_a_worker_is_503(client: TestClient, test_app: TestApp) -> None:
    """503 at once, rather than an answer that is held for ever."""
    test_app.start_fake_worker()
    client.post("/edits", json=TOWER, headers={"Prefer": "wait=20"})
    test_app.worker_parts.session.deregister()
    answer = client.get("/export")
    assert answer.status_code == 503 and "edit" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"version": 7}, "version"),
        ({"version": "x"}, "version"),
        ({"version": 0}, "version"),
        ({"format": "x"}, "format"),
    ],
)
def test_what_cannot_be_exported(
    client: TestClient, applied_edit: dict[str, Any], params: dict[str, Any], field: str
) -> None:
    """An unknown version or form, and a version without edits."""
    answer = client.get("/export", params=params)
    assert answer.status_code == 422 and field in str(answer.json())


def test_a_failed_export_says_why(
    client: TestClient, worker: FakeWorker, applied_edit: dict[str, Any]
) -> None:
    """What a worker says against an export of this version is 409, a fault of its own 500; whoever asks next has another chance."""
    worker.export_error = InvalidInput("the edited weights are too large: make them elsewhere.")
    answer = client.get("/export")
    assert answer.status_code == 409 and answer.json()["detail"] == worker.export_error.detail
    worker.export_error = RuntimeError("out of memory")
    assert client.get("/export").status_code == 500
    worker.export_error = None
    assert client.get("/export").status_code == 200


def test_a_file_of_edits_is_read(client: TestClient, applied_edit: dict[str, Any]) -> None:
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


def test_an_import_may_be_larger_than_other_bodies(client: TestClient, test_app: TestApp) -> None:
    """Up to a limit of its own."""
    large = b"x" * (test_app.settings.max_body + 1)
    assert client.post("/import", content=large, headers=BINARY).status_code == 422


def test_only_who_may_edit_may_import(client: TestClient, test_app: TestApp) -> None:
    """An export is for everyone who reads."""
    keys = client.app.state.keys  # type: ignore[attr-defined]
    _, token = keys.create("reader", ["read"])
    bearer = {"Authorization": f"Bearer {token}"}
    answer = client.post("/import", content=b"x", headers=BINARY | bearer)
    assert answer.status_code == 403 and "`edit`" in answer.json()["detail"]
    assert client.get("/export", headers=bearer).status_code in (422, 503)


def test_edits_that_fail_are_no_part_of_it(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """Only what is active is."""
    client.post("/edits", json=TOWER | {"target_new": FAILING_OBJECT}, headers={"Prefer": "wait=20"})
    data = client.get("/export", params={"format": "edits"}).content
    assert list(read_safetensors(data, "it").data) == [applied_edit["id"]]
