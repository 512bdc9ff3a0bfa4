"""Who says that a worker lives, and when it is silent."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from workers.keeper import HUNG, Keeper


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
    values = {"turned": time.monotonic(), "position": (3, "digest"), **engine}
    return Keeper(SimpleNamespace(**values), desk), desk  # type: ignore[arg-type]


def test_a_beat_says_the_version_and_sweeps_now_and_then() -> None:
    """Each beat tells the engine's position; sweeps are rarer."""
    kept, desk = keeper()
    kept.beat()
    kept.beat()
    assert desk.beats == [(3, "digest")] * 2
    assert desk.sweeps == 1


def test_nothing_is_said_for_a_loop_that_is_down_or_hangs() -> None:
    """A paused keeper is silent, and so is one whose loop has not come round for long."""
    hanging, first = keeper(turned=time.monotonic() - HUNG - 1)
    paused, second = keeper()
    paused.paused = True
    for kept, desk in ((hanging, first), (paused, second)):
        kept.beat()
        assert (desk.beats, desk.sweeps) == ([], 0)


def test_a_version_is_told_only_once_it_is_known() -> None:
    """Before the first version is built there is no heartbeat to give."""
    kept, desk = keeper(position=None)
    kept.beat()
    assert desk.beats == []
