"""`palimpsest study` on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main

Captured = pytest.CaptureFixture[str]


def test_a_trace_study_from_the_command_line(tmp_path: Path, capsys: Captured) -> None:
    """Words and table go to stdout; the folder has the numbers, the figures, the page, and a run for each fact."""
    asked = ["study", "trace", "facts", "--limit", "2", "--samples", "1", "--out", str(tmp_path)]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert "2 facts were asked and 2 traced" in shown.out and "last subject token" in shown.out
    names = {p.name for p in tmp_path.iterdir()}
    figures = {f"{name}.{kind}" for name in ("maps", "lines", "severed") for kind in ("png", "svg")}
    assert names == {"study.json", "report.html", "runs", *figures}
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert study["facts"] == len(list((tmp_path / "runs").iterdir())) == 2
    assert study["noise"]["factor"] == 3 and study["noise"]["subjects"] > 100
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_studied_is_said(tmp_path: Path, capsys: Captured) -> None:
    """A file that is not there ends the command before the model is loaded."""
    assert main(["study", "trace", "nothing.json", "--out", str(tmp_path)]) == 2
    assert "there is no file 'nothing.json'" in capsys.readouterr().err
