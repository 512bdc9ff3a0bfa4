"""Who says that a worker lives, and when it is silent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.heartbeat import Keeper


class Desk:
    def __init__(self) -> None:
        self.beats: list[tuple[int, str]] = []
        self.sweeps = 0

    def heartbeat(self, version: int, digest: str) -> None:
        self.beats.append((version, digest))

    def sweep(self) -> None:
        self.sweeps += 1


def keeper(**engine: Any) -> tuple[Keeper, Desk]:
    desk = Desk()
    values = {"hung": False, "position": (3, "digest"), **engine}
    made = Keeper(SimpleNamespace(**values), desk, lease=30.0)  # type: ignore[arg-type]
    made.resume()
    desk.beats.clear()
    return made, desk


def test_a_beat_says_the_version_and_sweeps_now_and_then() -> None:
    """Each beat tells the engine's position; sweeps are rarer."""
    kept, desk = keeper()
    kept.beat()
    kept.beat()
    assert desk.beats == [(3, "digest")] * 2
    assert desk.sweeps == 1  # when it resumed


def test_nothing_is_said_for_a_loop_that_is_down_or_hangs() -> None:
    """A paused keeper is silent, and so is one whose loop has not come round for long."""
    hanging, first = keeper(hung=True)
    paused, second = keeper()
    paused.paused = True
    for kept, desk, swept in ((hanging, first, 0), (paused, second, 1)):
        kept.beat()
        assert (desk.beats, desk.sweeps) == ([], swept)


def test_a_keeper_is_silent_before_its_worker_is_registered() -> None:
    """Nothing is said of a worker that has no row yet."""
    desk = Desk()
    made = Keeper(SimpleNamespace(hung=False, position=(3, "digest")), desk, lease=30.0)  # type: ignore[arg-type]
    made.beat()
    assert (desk.beats, desk.sweeps) == ([], 0)


def test_who_comes_back_does_not_sweep_at_once() -> None:
    """What was down for one worker may have been down for all: their jobs are no orphans before they had time."""
    kept, desk = keeper()
    kept.paused = True
    kept._swept -= 3600
    kept.resume()
    assert (desk.beats, desk.sweeps) == ([(3, "digest")], 1)


def test_a_sweep_that_failed_is_made_up_for() -> None:
    """A sweep that met an outage is due again at the next beat."""
    kept, desk = keeper()
    kept._swept -= 3600
    sweep, desk.sweep = desk.sweep, lambda: 1 / 0  # type: ignore[method-assign, assign, return-value]
    with pytest.raises(ZeroDivisionError):
        kept.beat()
    desk.sweep = sweep  # type: ignore[method-assign]
    kept.beat()
    assert desk.sweeps == 2


def test_a_version_is_told_only_once_it_is_known() -> None:
    """Before the first version is built there is no heartbeat to give."""
    kept, desk = keeper(position=None)
    kept.beat()
    assert desk.beats == []
