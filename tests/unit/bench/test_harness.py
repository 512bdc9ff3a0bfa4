"""Benchmarks compare ways that take turns, and keep what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import harness
from bench.harness import Kept, Report, Spread, in_turn, markdown


def test_a_spread_is_a_median_and_its_quartiles() -> None:
    """Of several values; of one value it is that value."""
    assert (Spread((4.0, 1.0, 2.0, 3.0, 5.0)).median, Spread((4.0, 1.0, 2.0, 3.0, 5.0)).quartiles) == (
        3,
        (2, 4),
    )
    assert Spread((7.0,)).quartiles == (7, 7)
    assert f"{Spread((1.0, 2.0, 3.0)):.1f}" == "2.0 (1.5 to 2.5)"


def test_ratios_are_taken_round_by_round() -> None:
    """What slowed both ways in one round is not seen in their ratio."""
    quiet_and_noisy = Spread((2.0, 20.0)).over(Spread((1.0, 10.0)))
    assert quiet_and_noisy.values == (2, 2)
    assert Spread((1.0, 2.0)).scaled(0.5).values == (0.5, 1)


def test_every_way_runs_once_a_round_and_another_comes_first_each_time() -> None:
    """Rounds that warm run like the others and are not counted; what makes ready comes before each."""
    ran: list[str] = []
    ways = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = in_turn(ways, rounds=3, warm=1, before=lambda name: ran.append(f"ready {name}"))
    turns = [ran[i : i + 6 : 2] for i in range(0, len(ran), 6)]
    assert {name: len(spread.values) for name, spread in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(ready == f"ready {name}" for ready, name in zip(ran[::2], ran[1::2], strict=True))
    assert len(turns) == 4 and all(sorted(turn) == ["ready a", "ready b", "ready c"] for turn in turns)
    assert {turn[0] for turn in turns[1:]} == {"ready a", "ready b", "ready c"}


def test_a_way_can_keep_what_it_gave() -> None:
    """The last result."""
    numbers = iter((1, 2))
    way = Kept(lambda: next(numbers))
    way()
    way()
    assert way.result == 2


def test_a_report_is_kept_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and notes as they were shown; as Markdown they stand again."""
    monkeypatch.setattr(harness, "KEPT", tmp_path / "bench")
    report = Report("speed")
    report.table("a table", ("way", "seconds"), [("one", Spread((1.0, 2.0))), ("two", 0.12345)])
    report.note("It was quick.")
    kept = json.loads((tmp_path / "bench" / "speed.json").read_text(encoding="utf-8"))
    assert kept["machine"]["cores"] and kept["notes"] == ["It was quick."]
    text = markdown(kept)
    assert "| way | seconds |" in text and "| two | 0.123 |" in text and "- It was quick." in text
