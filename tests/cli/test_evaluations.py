"""`palimpsest evaluate --service` against a service that answers from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_service import Fake, events
from house import EVALUATED, TOWER

from cli.main import main

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
