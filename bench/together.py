"""Edits that wait in a running service: taken one after another, and side by side. Run by bench/edits.py --together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.harness import Report, in_turn
from bench.house import House
from bench.shapes import model_of
from service.datasets.records import Record, read_records
from service.engine.engine import Pace
from service.settings import SHIPPED_MODEL

CHUNK = 16  # edits asked for at once while a ledger is filled


def together(count: int, active: int, rounds: int, report: Report) -> None:
    """So many waiting edits, one after another and side by side, with so many others active."""
    cases = read_records(SHIPPED_MODEL / "facts.jsonl", seed=1)
    others, asked = cases[:active], cases[active : active + count]
    paces = {"one after another": Pace(edits=1), "together": Pace(edits=count)}
    ended: dict[str, list[str]] = {name: [] for name in paces}
    active_still: dict[str, list[str]] = {name: [] for name in paces}
    with ExitStack() as stack:
        houses = {
            name: stack.enter_context(_house(pace, others, report.device)) for name, pace in paces.items()
        }

        def ask(name: str) -> None:
            found = houses[name].edit(asked)
            ended[name] += found.values()
            active_still[name] = [edit for edit, status in found.items() if status == "applied"]

        def clear(name: str) -> None:
            _revert(houses[name], active_still[name])

        seconds = in_turn({name: partial(ask, name) for name in houses}, rounds, before=clear)
    slow, fast = seconds["one after another"], seconds["together"]
    rows = [
        [name, s, s.scaled(1 / count), f"{ended[name].count('applied')} of {len(ended[name])}"]
        for name, s in seconds.items()
    ]
    columns = ("way", "seconds", "seconds an edit", "applied")
    report.table(f"{count} waiting edits, {active} others active", columns, rows)
    report.note(
        f"{count} edits together take 1 / {slow.over(fast):.3g} of the time, with {active} others active."
    )


def _revert(house: House, edits: Sequence[str]) -> None:
    """Take edits back, and wait until the engine serves what is left."""
    for edit in edits:
        house.wired.operations.edits.revert(edit, "bench")
    while house.engine.position is None or house.engine.position[0] < house.wired.operations.ledger.head():
        time.sleep(0.01)


@contextmanager
def _house(pace: Pace, others: Sequence[Record], device: str) -> Iterator[House]:
    """A running service of its own, with these edits active."""
    with (
        tempfile.TemporaryDirectory() as folder,
        House(Path(folder), model_of("shipped", device), pace) as house,
    ):
        for at in range(0, len(others), CHUNK):
            house.edit(others[at : at + CHUNK])
        yield house
