"""`palimpsest report`, with folders and with evaluations of a fake service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from tests.support.application import EVALUATION_RESULT
from tests.support.fake_http_service import FakeService

Captured = pytest.CaptureFixture[str]


def store(folder: Path, method: str) -> str:
    folder.mkdir()
    result = EVALUATION_RESULT | {"plan": EVALUATION_RESULT["plan"] | {"method": method}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return str(folder)


def test_folders_and_evaluations_of_the_service_are_compared(
    fake: FakeService, capsys: Captured, tmp_path: Path
) -> None:
    """The table has a column for each, and the page and the CSV are written."""
    fake.responses = {
        "GET /evaluations/evaluation_1": {"id": "evaluation_1", "status": "done", "result": EVALUATION_RESULT}
    }
    files = ["--out", str(tmp_path / "new" / "page.html"), "--csv", str(tmp_path / "all.csv")]
    assert main(["report", store(tmp_path / "a", "memit"), "evaluation_1", *files]) == 0
    shown = capsys.readouterr()
    header = shown.out.splitlines()[0]
    assert "memit" in header and "rome" in header and "page.html" in shown.err
    assert "Methods and measures" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert (tmp_path / "all.csv").read_text(encoding="utf-8").startswith('"model","method"')


def test_evaluation_without_a_result_is_refused(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """An evaluation that runs, and a folder without a result, are errors that name it; no page is written."""
    fake.responses = {
        "GET /evaluations/evaluation_1": {"id": "evaluation_1", "status": "running", "result": None}
    }
    out = ["--out", str(tmp_path / "page.html")]
    assert main(["report", "evaluation_1", *out]) == 1
    assert "evaluation_1 is running" in capsys.readouterr().err
    assert main(["report", str(tmp_path), *out]) == 1
    assert "contains no result" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
