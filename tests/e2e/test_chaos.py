"""The chaos bench on a small plan of faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.chaos import main


@pytest.mark.slow
def test_a_small_run_passes(shipped: Path, tmp_path: Path) -> None:
    """Six faults of a fixed seed violate no guarantee."""
    report_path = tmp_path / "report.json"
    small = ["--faults", "6", "--pause", "3", "--workers", "2", "--apis", "1"]
    assert main([*small, "--seed", "1", "--json", str(report_path)]) == 0
    report = json.loads(report_path.read_text(encoding="utf-8"))
    assert len(report["faults"]) == 6
    assert report["versions"] > 0 and report["answers"] > 0
