"""`palimpsest evaluate --service` and `palimpsest evaluations`, tested against a fake service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.evaluations import describe_request
from cli.main import main
from tests.support.application import EVALUATION_RESULT, TOWER
from tests.support.fake_http_service import FakeService, sse_stream

Captured = pytest.CaptureFixture[str]
EVALUATION_PATH = "/evaluations/evaluation_1"
QUEUED = {
    "id": "evaluation_1",
    "status": "queued",
    "links": {"self": EVALUATION_PATH, "events": f"{EVALUATION_PATH}/events"},
}


def fake_answers(**end: Any) -> dict[str, Any]:
    """Return the responses of a service that accepts an evaluation, and sends one progress event and
    its end."""
    told = sse_stream(("progress", {"phase": "find", "done": 1, "total": 2}), ("end", {}))
    return {
        "POST /evaluations": QUEUED,
        f"GET {EVALUATION_PATH}/events": told,
        f"GET {EVALUATION_PATH}": QUEUED | end,
    }


def test_the_service_evaluates_a_file(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """The records and the plan are sent to the service. The table is printed, and the result and the report
    are written."""
    (tmp_path / "records.jsonl").write_text(json.dumps(TOWER), encoding="utf-8")
    fake.responses = fake_answers(status="done", result=EVALUATION_RESULT)
    flags = ["--service", "--out", str(tmp_path / "out"), "--mode", "sequence", "--limit", "1"]
    assert main(["evaluate", str(tmp_path / "records.jsonl"), *flags]) == 0
    asked = {"mode": "sequence", "generation": False, "damage": True, "limit": 1, "records": [TOWER]}
    assert fake.requests[0] == ("POST /evaluations", asked)
    shown = capsys.readouterr()
    assert "ES" in shown.out and "evaluation_1 runs in the service" in shown.err
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8")) == EVALUATION_RESULT
    assert (tmp_path / "out" / "report.html").exists()


def test_an_evaluation_that_fails_says_why(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """A failed evaluation exits with 1 and its error, and writes no files."""
    fake.responses = fake_answers(status="failed", error={"title": "x", "detail": "out of memory."})
    assert main(["evaluate", "facts", "--service", "--out", str(tmp_path / "out")]) == 1
    assert fake.requests[0][1]["dataset"] == "facts"
    assert "evaluation_1 is failed: out of memory." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--unique-subjects", "--split=tune", "--damage-corpus=x"])
def test_local_only_options_are_refused_with_service(
    fake: FakeService, capsys: Captured, tmp_path: Path, flag: str
) -> None:
    """An option that is not supported with --service is rejected before a request is sent."""
    assert main(["evaluate", "facts", "--service", "--out", str(tmp_path), flag]) == 1
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert fake.requests == []


def test_evaluations_are_listed_and_shown(fake: FakeService, capsys: Captured) -> None:
    """`evaluations` prints a line with the plan and the progress of each evaluation. `evaluations show`
    prints the tables, or exits with 1 and the status when there is no result."""
    request = {"objective": "write", "method": "rome", "mode": "single", "records": 12, "limit": None}
    told = {**QUEUED, "created": "2026-01-01T00:00:00Z", "request": request}
    running = {**told, "status": "running", "progress": {"phase": "find", "done": 3, "total": 12}}
    fake.responses = {"GET /evaluations": {"items": [told, running], "next": None}}
    assert main(["evaluations"]) == 0
    shown = capsys.readouterr().out
    assert "write by rome, single, 12 records" in shown and "find: 3 of 12" in shown
    fake.responses = {f"GET {EVALUATION_PATH}": {**told, "status": "done", "result": EVALUATION_RESULT}}
    assert main(["evaluations", "show", "evaluation_1"]) == 0
    assert "ES" in capsys.readouterr().out
    fake.responses = {f"GET {EVALUATION_PATH}": {**told, "status": "cancelled", "result": None}}
    assert main(["evaluations", "show", "evaluation_1"]) == 1
    assert "evaluation_1 is cancelled" in capsys.readouterr().err
    fake.responses = {"GET /evaluations": {"items": [], "next": None}}
    assert main(["evaluations"]) == 0
    assert capsys.readouterr().out == "There are no evaluations.\n"


def test_an_evaluation_as_json(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """`--json` prints the result, or the resource of an evaluation without a result."""
    place = ["evaluate", "facts", "--service", "--json", "--out", str(tmp_path / "out")]
    fake.responses = fake_answers(status="done", result=EVALUATION_RESULT)
    assert main(place) == 0
    assert json.loads(capsys.readouterr().out) == EVALUATION_RESULT
    fake.responses = fake_answers(status="failed")
    assert main(place) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


@pytest.mark.parametrize(
    ("limit", "count", "said"),
    [(20, 2, "single, 2 records"), (20, 200, "single, 20 of 200 records"), (None, 2, "single, 2 records"), (2, 2, "single, 2 records")],
)  # fmt: skip
def test_no_more_records_are_named_than_there_are(limit: int | None, count: int, said: str) -> None:
    """A limit that the records do not reach is left out of the description."""
    request = {"objective": "write", "method": "rome", "mode": "single", "limit": limit, "records": count}
    assert describe_request({"request": request}).endswith(said)
