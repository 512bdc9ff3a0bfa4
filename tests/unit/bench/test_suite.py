"""The suite runs every benchmark and says how each ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import suite
from bench.suite import BENCHES, Outcome, report, run


def test_every_script_is_there() -> None:
    """Each benchmark has a file, and a report of its own."""
    assert all((suite.ROOT / "bench" / b.script).is_file() for b in BENCHES)
    assert len({b.name for b in BENCHES}) == len(BENCHES)


def test_the_reference_goes_to_those_that_compare(tmp_path: Path) -> None:
    """As an absolute path; the others are not told of it."""
    told = {b.name for b in BENCHES if str(tmp_path.resolve()) in b.command(tmp_path, "cpu")}
    assert told == {"edits", "traces"}
    assert not any("--reference" in b.command(None, "cpu") for b in BENCHES)


def test_what_was_kept_before_is_not_taken_for_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that fails leaves no report, and its exit code is told."""
    monkeypatch.setattr(suite, "KEPT", tmp_path)
    (tmp_path / "edits.json").write_text("{}", encoding="utf-8")
    outcome = run(BENCHES[0], [sys.executable, "-c", "raise SystemExit(3)"])
    assert (outcome.name, outcome.code, (tmp_path / "edits.json").exists()) == ("edits", 3, False)


def test_failures_are_said_beside_what_the_others_found(tmp_path: Path) -> None:
    """One text for all, with the tables of those that kept any."""
    table = {"title": "t", "columns": ["way"], "rows": [["quick"]]}
    kept = {"name": "good", "command": "python x", "when": "now", "tables": [table], "notes": []}
    (tmp_path / "good.json").write_text(json.dumps(kept), encoding="utf-8")
    text = report([Outcome("bad", 1, 2.0), Outcome("good", 0, 3.0)], tmp_path)
    assert "bad: FAILED with exit code 1" in text and "good: done" in text and "| quick |" in text
