"""Exports and imports over HTTP: api.routes.exports."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import InvalidInput
from service.kit.safetensors_io import read_safetensors
from tests.support.application import EXPORT_CHUNKS, FAILING_OBJECT, TOWER, FakeWorker, TestApp

BINARY = {"Content-Type": "application/octet-stream"}
WAIT = {"Prefer": "wait=20"}


@pytest.fixture
def applied_edit(client: TestClient, worker: FakeWorker) -> dict[str, Any]:
    """Return an edit that is applied at version 1."""
    return client.post("/edits", json=TOWER, headers=WAIT).json()  # type: ignore[no-any-return]


def export_edit_set(client: TestClient) -> bytes:
    """Return the edit set of the newest version."""
    export = client.post("/exports", json={"format": "edits"})
    return client.get(export.json()["links"]["file"]).content


def test_export_of_an_adapter(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """An export is a job. Its file is downloaded from `links.file` with a name that has the model, version
    and format."""
    created = client.post("/exports", json={"version": "head", "format": "peft"}, headers=WAIT)
    export = created.json()
    assert (created.status_code, created.headers["location"]) == (200, f"/exports/{export['id']}")
    assert (export["status"], export["request"]) == ("done", {"version": 1, "format": "peft"})
    answer = client.get(export["links"]["file"])
    assert (answer.status_code, answer.content) == (200, b"".join(EXPORT_CHUNKS))
    assert answer.headers["content-disposition"] == 'attachment; filename="tiny-v1-peft.zip"'
    assert answer.headers["content-type"] == "application/zip"
    (job,) = client.get("/jobs", params={"kind": "export"}).json()["items"]
    assert client.get(job["links"]["self"]).json() == export
    assert [e["id"] for e in client.get("/exports").json()["items"]] == [export["id"]]


def test_export_is_202_while_it_is_open(
    client: TestClient, worker: FakeWorker, applied_edit: dict[str, Any]
) -> None:
    """While an export is running, POST returns 202 with the same export, and its file gets 409."""
    worker.may_finish.clear()
    created = client.post("/exports", json={})
    export = created.json()
    assert created.status_code == 202 and export["status"] in ("queued", "running")
    assert client.get(export["links"]["file"]).status_code == 409
    assert client.post("/exports", json={}).json()["id"] == export["id"]
    worker.may_finish.set()
    assert client.get(export["links"]["self"], headers=WAIT).json()["status"] == "done"
    assert client.get(export["links"]["file"]).status_code == 200


def test_edit_set_needs_no_worker(client: TestClient, test_app: TestApp) -> None:
    """An edit set is read from the ledger, so its export is done when it is created."""
    test_app.start_fake_worker()
    edit = client.post("/edits", json=TOWER, headers=WAIT).json()
    test_app.worker_parts.session.deregister()
    created = client.post("/exports", json={"format": "edits", "version": "head"})
    assert created.status_code == 200
    export = created.json()
    answer = client.get(export["links"]["file"])
    assert answer.headers["content-disposition"] == 'attachment; filename="version-1.edits.safetensors"'
    assert answer.headers["content-type"] == "application/octet-stream"
    assert len(answer.content) == export["result"]["bytes"]
    exported = read_safetensors(answer.content, "it")
    assert exported.read(edit["id"]) == b"factors of " + edit["id"].encode()
    assert '"Eiffel Tower"' in exported.metadata["set"]
    assert client.post("/exports", json={"format": "edits", "version": 1}).json()["id"] == export["id"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"version": 7}, "version"),
        ({"version": "x"}, "version"),
        ({"version": 0}, "version"),
        ({"format": "x"}, "format"),
        ({"formats": "peft"}, "formats"),
    ],
)
def test_invalid_exports_are_422(
    client: TestClient, applied_edit: dict[str, Any], body: dict[str, Any], field: str
) -> None:
    """Unknown versions and formats, and versions without active edits, get 422."""
    answer = client.post("/exports", json=body)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_failed_export_has_a_code(
    client: TestClient, worker: FakeWorker, applied_edit: dict[str, Any]
) -> None:
    """A failed export has the code of its error and no file; the next request creates a new export."""
    worker.export_error = InvalidInput("the edited weights are too large.")
    failed = client.post("/exports", json={}, headers=WAIT).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_input")
    answer = client.get(failed["links"]["file"])
    assert answer.status_code == 409 and "too large" in answer.json()["detail"]
    worker.export_error = None
    assert client.post("/exports", json={}, headers=WAIT).json()["status"] == "done"


def test_idempotency_key_returns_the_same_export(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """A repeated Idempotency-Key returns the first export, and gets 422 with another body."""
    headers = WAIT | {"Idempotency-Key": "k"}
    first = client.post("/exports", json={}, headers=headers).json()
    assert client.post("/exports", json={}, headers=headers).json() == first
    assert client.post("/exports", json={"format": "edits"}, headers=headers).status_code == 422


def test_import_reads_an_edit_set(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """A damaged or empty file gets 422."""
    data = export_edit_set(client)
    answer = client.post("/import", content=data[:-1] + b"x", headers=BINARY)
    assert answer.status_code == 422 and "damaged" in answer.json()["detail"]
    answer = client.post("/import", content=b"", headers=BINARY)
    assert answer.status_code == 422


def test_import_requires_a_binary_content_type(client: TestClient) -> None:
    """POST /import accepts only application/octet-stream, so a page of another origin cannot import without a
    preflight request."""
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"}):
        assert client.post("/import", content=b"x", headers=headers).status_code == 415


def test_import_has_a_body_limit_of_its_own(client: TestClient, test_app: TestApp) -> None:
    """POST /import reads a body larger than `max_body`."""
    large = b"x" * (test_app.settings.max_body + 1)
    assert client.post("/import", content=large, headers=BINARY).status_code == 422


def test_scopes_of_export_and_import(client: TestClient, test_app: TestApp) -> None:
    """An import needs the scope `edit`, and an export the scope `read`."""
    keys = client.app.state.keys  # type: ignore[attr-defined]
    _, token = keys.create("reader", ["read"])
    bearer = {"Authorization": f"Bearer {token}"}
    answer = client.post("/import", content=b"x", headers=BINARY | bearer)
    assert answer.status_code == 403 and "`edit`" in answer.json()["detail"]
    assert client.post("/exports", json={}, headers=bearer).status_code == 422


def test_failed_edits_are_not_exported(client: TestClient, applied_edit: dict[str, Any]) -> None:
    """An edit set contains active edits only."""
    client.post("/edits", json=TOWER | {"target_new": FAILING_OBJECT}, headers=WAIT)
    assert list(read_safetensors(export_edit_set(client), "it").tensor_infos) == [applied_edit["id"]]
