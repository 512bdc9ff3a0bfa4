"""`palimpsest jobs`, tested against a fake service."""

from __future__ import annotations

from typing import Any

import pytest

from cli.main import main
from tests.support.fake_http_service import FakeService

Captured = pytest.CaptureFixture[str]


def make_job(**changes: Any) -> dict[str, Any]:
    made = {
        "id": "edit_1",
        "kind": "edit",
        "status": "failed",
        "attempts": 3,
        "error": None,
        "subject": "Nile",
    }
    return {**made, "created": "2026-11-21T03:00:00Z", **changes}


def test_jobs_are_listed_with_the_reason(fake: FakeService, capsys: Captured) -> None:
    """A failed job is listed with its error, without control characters."""
    why = {"title": "The job was given up", "detail": "its worker died 3 times.\x1b[2J"}
    fake.responses = {
        "GET /jobs": {"items": [make_job(error=why), make_job(id="trace_1", kind="trace")], "next": None}
    }
    assert main(["jobs", "--exhausted", "--kind", "edit", "--limit", "5"]) == 0
    shown = capsys.readouterr().out
    assert "edit_1" in shown and "trace_1" in shown and "its worker died 3 times." in shown
    assert "\x1b" not in shown
    assert fake.requests == [("GET /jobs", {"exhausted": "true", "kind": "edit", "limit": "5"})]


def test_no_jobs(fake: FakeService, capsys: Captured) -> None:
    """An empty list prints a sentence."""
    fake.responses = {"GET /jobs": {"items": [], "next": None}}
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "There are no jobs.\n"
    assert main(["jobs", "--exhausted"]) == 0
    assert capsys.readouterr().out == "No jobs match.\n"


def test_a_job_is_retried(fake: FakeService, capsys: Captured) -> None:
    """`jobs retry` sends the request and prints the new status."""
    fake.responses = {"POST /jobs/edit_1/retry": make_job(status="queued")}
    assert main(["jobs", "retry", "edit_1"]) == 0
    assert capsys.readouterr().out == "edit_1 is queued again.\n"


def test_a_job_that_cannot_be_retried(fake: FakeService, capsys: Captured) -> None:
    """`jobs retry` exits with 1 and the detail of the service if the retry is rejected."""
    fake.responses = {
        "POST /jobs/edit_1/retry": fake.problem(409, "edit_1 is applied: only a failed job waits again.")
    }
    assert main(["jobs", "retry", "edit_1"]) == 1
    assert "only a failed job" in capsys.readouterr().err


def test_jobs_are_listed_with_their_subject(fake: FakeService, capsys: Captured) -> None:
    """A listed job has the short description that the service gives."""
    fake.responses = {"GET /jobs": {"items": [make_job(subject="Eiffel Tower")], "next": None}}
    assert main(["jobs"]) == 0
    assert "Eiffel Tower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("id", "path"),
    [
        ("edit_1", "/edits"),
        ("trace_1", "/trace"),
        ("export_1", "/exports"),
        ("evaluation_1", "/evaluations"),
    ],
)
def test_an_open_job_of_any_kind_is_cancelled(
    fake: FakeService, capsys: Captured, id: str, path: str
) -> None:
    """`jobs cancel` finds the resource by the beginning of the id, and cancels it."""
    open_job = make_job(id=id, status="running", subject="Nile", prompt="{} is")
    fake.responses = {
        f"GET {path}/{id}": open_job,
        f"DELETE {path}/{id}": [open_job, {**open_job, "status": "cancelled"}],
    }
    assert main(["jobs", "cancel", id]) == 0
    assert capsys.readouterr().out == f"{id} is cancelled before its next step.\n"
    assert main(["jobs", "cancel", id]) == 0
    assert capsys.readouterr().out == f"{id} is cancelled.\n"


def test_an_applied_edit_is_not_cancelled(fake: FakeService, capsys: Captured) -> None:
    """`jobs cancel` refuses a job that has ended, and sends nothing that would revert an applied edit."""
    fake.responses = {"GET /edits/edit_1": make_job(status="applied", subject="Nile", prompt="{} is")}
    assert main(["jobs", "cancel", "edit_1"]) == 1
    said = capsys.readouterr().err
    assert "edit_1 is applied" in said and "palimpsest revert edit_1" in said
    assert [name for name, _ in fake.requests] == ["GET /edits/edit_1"]


def test_an_unknown_kind_of_id_is_refused(fake: FakeService, capsys: Captured) -> None:
    """`jobs cancel` sends no request for a word that is no id of a job."""
    assert main(["jobs", "cancel", "nonsense"]) == 1
    assert "no id of a job" in capsys.readouterr().err
    assert fake.requests == []
