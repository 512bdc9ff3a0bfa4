"""The list of all jobs, and retries of failed jobs."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

from tests.support.application import FAILING_OBJECT, PROMPT, TOWER, FakeWorker

WAIT = {"prefer": "wait=20"}


def job_ids(client: TestClient, **filters: Any) -> list[str]:
    return [job["id"] for job in client.get("/jobs", params=filters).json()["items"]]


def test_jobs_of_all_kinds_are_listed(client: TestClient) -> None:
    """GET /jobs lists edits and traces together, newest first, with filters and pages."""
    edit = client.post("/edits", json=TOWER).json()["id"]
    trace = client.post("/trace", json={"prompt": PROMPT, "subject": "Eiffel Tower"}).json()["id"]
    assert job_ids(client) == [trace, edit]
    assert job_ids(client, kind="edit") == [edit]
    assert job_ids(client, status="running") == job_ids(client, exhausted="true") == []
    page = client.get("/jobs", params={"limit": 1}).json()
    assert job_ids(client, cursor=page["next"]) == [edit]
    (job,) = client.get("/jobs", params={"kind": "trace"}).json()["items"]
    assert client.get(job["links"]["self"]).json()["id"] == trace


def test_a_failed_job_can_be_retried(client: TestClient, worker: FakeWorker) -> None:
    """A retry queues a failed job again under the same id, with its attempts reset."""
    edit = client.post("/edits", json=TOWER | {"target_new": FAILING_OBJECT}, headers=WAIT).json()
    assert edit["status"] == "failed"
    worker.may_finish.clear()
    answer = client.post(f"/jobs/{edit['id']}/retry")
    assert answer.status_code == 202
    assert answer.headers["location"] == edit["links"]["self"]
    assert (answer.json()["status"], answer.json()["attempts"]) == ("queued", 0)
    worker.may_finish.set()
    again = client.get(edit["links"]["self"], headers=WAIT).json()
    assert (again["status"], again["attempts"]) == ("failed", 1)


def test_only_failed_jobs_can_be_retried(client: TestClient) -> None:
    """A retry of a queued job gets 409, and of an unknown job 404."""
    edit = client.post("/edits", json=TOWER).json()
    assert client.post(f"/jobs/{edit['id']}/retry").status_code == 409
    assert client.post("/jobs/edit_gone/retry").status_code == 404
