"""The suite runs every benchmark and reports its outcome: bench/suite.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import suite
from bench.suite import BENCH_SCRIPTS, Outcome, combined_report, run_script
from tests.support.paths import ROOT


def test_every_script_is_there() -> None:
    """The script of each benchmark exists, and the names of the reports are unique."""
    assert all((ROOT / "bench" / b.script).is_file() for b in BENCH_SCRIPTS)
    assert len({b.name for b in BENCH_SCRIPTS}) == len(BENCH_SCRIPTS)


def test_the_reference_goes_to_those_that_compare(tmp_path: Path) -> None:
    """The reference is passed as an absolute path, and only to the scripts that use it."""
    names = {b.name for b in BENCH_SCRIPTS if str(tmp_path.resolve()) in b.command(tmp_path, "cpu")}
    assert names == {"edits", "traces"}
    assert not any("--reference" in b.command(None, "cpu") for b in BENCH_SCRIPTS)


def test_old_report_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed benchmark has its exit code recorded and its earlier report removed."""
    monkeypatch.setattr(suite, "REPORTS_DIR", tmp_path)
    (tmp_path / "edits.json").write_text("{}", encoding="utf-8")
    outcome = run_script(BENCH_SCRIPTS[0], [sys.executable, "-c", "raise SystemExit(3)"])
    assert (outcome.name, outcome.code, (tmp_path / "edits.json").exists()) == ("edits", 3, False)


def test_combined_report_lists_failures(tmp_path: Path) -> None:
    """The combined report has all outcomes, including failures, and the tables of all reports."""
    table = {"title": "t", "columns": ["way"], "rows": [["quick"]]}
    saved = {"name": "good", "command": "python x", "when": "now", "tables": [table], "notes": []}
    (tmp_path / "good.json").write_text(json.dumps(saved), encoding="utf-8")
    text = combined_report([Outcome("bad", 1, 2.0), Outcome("good", 0, 3.0)], tmp_path)
    assert "bad: FAILED with exit code 1" in text and "good: done" in text and "| quick |" in text
