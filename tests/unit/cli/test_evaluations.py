"""`palimpsest evaluate --service` against a service that answers from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.support.application import EVALUATED, TOWER
from tests.support.fake_http_service import Fake, events

Captured = pytest.CaptureFixture[str]
PLACE = "/evaluations/evaluation_1"
QUEUED = {"id": "evaluation_1", "status": "queued", "links": {"self": PLACE, "events": f"{PLACE}/events"}}


def answers(**end: Any) -> dict[str, Any]:
    """A service that accepts an evaluation, tells one progress and the end."""
    told = events(("progress", {"phase": "find edits", "done": 1, "total": 2}), ("end", {}))
    return {"POST /evaluations": QUEUED, f"GET {PLACE}/events": told, f"GET {PLACE}": QUEUED | end}


def test_the_service_evaluates_a_file(fake: Fake, capsys: Captured, tmp_path: Path) -> None:
    """The records are sent as they are, with what was asked of the plan; table, result and report come as from here."""
    (tmp_path / "records.jsonl").write_text(json.dumps(TOWER), encoding="utf-8")
    fake.answers = answers(status="done", result=EVALUATED)
    flags = ["--service", "--out", str(tmp_path / "out"), "--mode", "sequence", "--limit", "1"]
    assert main(["evaluate", str(tmp_path / "records.jsonl"), *flags]) == 0
    asked = {"mode": "sequence", "generation": False, "damage": True, "limit": 1, "records": [TOWER]}
    assert fake.asked[0] == ("POST /evaluations", asked)
    shown = capsys.readouterr()
    assert "ES" in shown.out and "evaluation_1 goes on" in shown.err
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8")) == EVALUATED
    assert (tmp_path / "out" / "report.html").exists()


def test_an_evaluation_that_fails_says_why(fake: Fake, capsys: Captured, tmp_path: Path) -> None:
    """Of an evaluation that has no result it is said what became of it, and nothing is written."""
    fake.answers = answers(status="failed", error={"title": "x", "detail": "out of memory."})
    assert main(["evaluate", "facts", "--service", "--out", str(tmp_path / "out")]) == 1
    assert fake.asked[0][1]["dataset"] == "facts"
    assert "evaluation_1 is failed: out of memory." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--distinct", "--half=tune", "--texts=x"])
def test_what_the_service_does_not_do_is_refused_first(
    fake: Fake, capsys: Captured, tmp_path: Path, flag: str
) -> None:
    """A flag that only means something here is refused before anything is asked."""
    assert main(["evaluate", "facts", "--service", "--out", str(tmp_path), flag]) == 1
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert fake.asked == []


def test_evaluations_are_listed_and_shown(fake: Fake, capsys: Captured) -> None:
    """A line for each evaluation with what it is of and how far it is; `show` has its tables, or why there are none."""
    request = {"objective": "write", "method": "rome", "mode": "single", "records": 12, "limit": None}
    told = {**QUEUED, "created": "2026-01-01T00:00:00Z", "request": request}
    running = {**told, "status": "running", "progress": {"phase": "find edits", "done": 3, "total": 12}}
    fake.answers = {"GET /evaluations": {"items": [told, running], "next": None}}
    assert main(["evaluations"]) == 0
    shown = capsys.readouterr().out
    assert "write by rome, single, 12 records" in shown and "find edits: 3 of 12" in shown
    fake.answers = {f"GET {PLACE}": {**told, "status": "done", "result": EVALUATED}}
    assert main(["evaluations", "show", "evaluation_1"]) == 0
    assert "ES" in capsys.readouterr().out
    fake.answers = {f"GET {PLACE}": {**told, "status": "cancelled", "result": None}}
    assert main(["evaluations", "show", "evaluation_1"]) == 1
    assert "evaluation_1 is cancelled" in capsys.readouterr().err
    fake.answers = {"GET /evaluations": {"items": [], "next": None}}
    assert main(["evaluations"]) == 0
    assert capsys.readouterr().out == "There are no evaluations.\n"


def test_an_evaluation_for_a_program(fake: Fake, capsys: Captured, tmp_path: Path) -> None:
    """`--json` prints the result that is written, or the evaluation as it is when it has none."""
    place = ["evaluate", "facts", "--service", "--json", "--out", str(tmp_path / "out")]
    fake.answers = answers(status="done", result=EVALUATED)
    assert main(place) == 0
    assert json.loads(capsys.readouterr().out) == EVALUATED
    fake.answers = answers(status="failed")
    assert main(place) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"
