"""What the terminal shows: progress bars, tables, heat maps. Text from outside is never read as markup or control codes."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

PIPE = 160  # columns where no terminal says how many there are

#: answers go to stdout, all that is said about them to stderr: `palimpsest generate ... > file` holds only the text
out = Console(
    width=None if sys.stdout.isatty() else PIPE, markup=False, highlight=False, emoji=False, soft_wrap=True
)
err = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

#: white to dark of one colour, as the figures of the paper: hidden states, MLP, attention
SHADES = {"hidden": (88, 24, 140), "mlp": (0, 104, 55), "attn": (165, 15, 21)}
GREYS = " ░▒▓█"

#: columns that a person copies from, never broken over lines
WHOLE = ("id", "edit", "when (UTC)")


def plain(text: str) -> str:
    """Text without control characters: a model or a stranger's edit cannot steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Bar:
    """One progress bar whose words change with the phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._phase = ""

    def show(self, phase: str, done: int, total: int) -> None:
        if self._task is None or phase != self._phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._phase = self._progress.add_task(plain(phase), total=total or None), phase
        self._progress.update(self._task, completed=done, total=total or None)


@contextmanager
def bar() -> Iterator[Bar]:
    """A bar on stderr that is gone when the work is done; nothing where stderr is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A small table; numbers stand to the right."""
    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    rows = [list(row) for row in rows]
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        whole = numeric or name in WHOLE
        made.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row))
    return made


def cell(value: Any) -> str:
    """A value in a table: nothing is a dash, a probability has three digits."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    return plain(str(value)).replace("\n", "⏎")


def heat_map(
    kind: str,
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    low: float,
    high: float,
    marked: range,
    coloured: bool = True,
) -> Text:
    """Colour blocks: a line per token, a block per layer; `low` is white and `high` the full colour.

    Where there are no colours (a file, NO_COLOR), characters of more or less ink take their place.

    Tokens of the subject (`marked`) carry a star, as in the figures of the paper.
    """
    names = [f"{cell(token)}{'*' if i in marked else ''}" for i, token in enumerate(rows)]
    width = max(map(len, names), default=0)
    full = SHADES.get(kind, (8, 48, 107))
    text = Text()
    for name, line in zip(names, values, strict=True):
        text.append(f"{name:>{width}} ")
        for value in line:
            share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
            if not coloured:
                text.append(2 * GREYS[round(share * (len(GREYS) - 1))])
                continue
            colour = "".join(f"{round(255 + (c - 255) * share):02x}" for c in full)
            text.append("  ", Style(bgcolor=f"#{colour}"))
        text.append("\n")
    layers = len(values[0]) if values else 0
    text.append(f"{'':>{width}} {0:<{max(0, 2 * layers - 2)}}{layers - 1:>2}  layer\n")
    text.append(f"{'':>{width}} {low:.3f} (white) to {high:.3f}\n")
    return text


def lines(pairs: Mapping[str, Any]) -> str:
    """`name  value`, one to a line, for what is known."""
    known = {name: value for name, value in pairs.items() if value is not None}
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {cell(value)}" for name, value in known.items())
