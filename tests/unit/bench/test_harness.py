"""Interleaved timing and reports: bench/harness.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import harness
from bench.harness import Report, ResultRecorder, Spread, report_markdown, time_interleaved


def test_a_spread_is_a_median_and_its_quartiles() -> None:
    """A spread is formatted as median and quartiles, or as the value if there is only one."""
    several = Spread((4.0, 1.0, 2.0, 3.0, 5.0))
    assert several.median == 3
    assert several.quartiles == (2.0, 4.0)
    assert Spread((7.0,)).quartiles == (7.0, 7.0)
    assert f"{Spread((1.0, 2.0, 3.0)):.1f}" == "2.0 (1.5 to 2.5)"


def test_ratios_are_taken_round_by_round() -> None:
    """Load common to both tasks in a round does not change their ratio."""
    quiet_and_noisy = Spread((2.0, 20.0)).ratio_to(Spread((1.0, 10.0)))
    assert quiet_and_noisy.values == (2.0, 2.0)
    assert Spread((1.0, 2.0)).scaled(0.5).values == (0.5, 1.0)


def test_tasks_are_interleaved() -> None:
    """Warm-up rounds run and are not counted; `prepare` runs before each task."""
    calls: list[str] = []
    tasks = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = time_interleaved(tasks, rounds=3, warmup=1, prepare=lambda name: calls.append(f"ready {name}"))
    turns = [calls[i : i + 6 : 2] for i in range(0, len(calls), 6)]
    assert {name: len(spread.values) for name, spread in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(ready == f"ready {name}" for ready, name in zip(calls[::2], calls[1::2], strict=True))
    assert len(turns) == 4 and all(sorted(turn) == ["ready a", "ready b", "ready c"] for turn in turns)
    assert {turn[0] for turn in turns[1:]} == {"ready a", "ready b", "ready c"}


def test_recorder_keeps_the_last_result() -> None:
    """The recorder keeps the last result."""
    numbers = iter((1, 2))
    recorder = ResultRecorder(lambda: next(numbers))
    recorder()
    recorder()
    assert recorder.result == 2


def test_report_is_saved_with_machine_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and notes are saved as shown and formatted as Markdown."""
    monkeypatch.setattr(harness, "REPORTS_DIR", tmp_path / "bench")
    report = Report("speed")
    report.add_table("a table", ("way", "seconds"), [("one", Spread((1.0, 2.0))), ("two", 0.12345)])
    report.add_note("It was quick.")
    saved = json.loads((tmp_path / "bench" / "speed.json").read_text(encoding="utf-8"))
    assert saved["machine"]["cores"] and saved["notes"] == ["It was quick."]
    text = report_markdown(saved)
    assert "| way | seconds |" in text and "| two | 0.123 |" in text and "- It was quick." in text
