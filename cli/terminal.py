"""Output on the terminal: progress bars, tables, lists and JSON. External text is never interpreted as markup or
control codes."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from service.kit.time_estimate import TimeEstimate

LINE_INTERVAL = 10.0  # seconds between two lines of progress
PROGRESS_VARIABLE = "PALIMPSEST_PROGRESS"  # `none`: neither bars nor lines
DEFAULT_WIDTH = 160  # columns when stdout is not a terminal
EMPTY_CELL = "–"

#: results go to stdout, everything else to stderr: `palimpsest generate ... > file` writes the text only
out = Console(
    width=None if sys.stdout.isatty() else DEFAULT_WIDTH,
    markup=False,
    highlight=False,
    emoji=False,
    soft_wrap=True,
)
err = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

#: colour of a status; statuses of finished work that needs no attention have none
STATUS_COLOURS = {
    "queued": "cyan", "running": "cyan", "applied": "green", "done": "green", "rejected": "red", "failed": "red",
    "serving": "green", "withdrawn": "red",
}  # fmt: skip
BAR_BLOCKS = " ▏▎▍▌▋▊▉█"


def strip_control_chars(text: str) -> str:
    """Remove control characters, so that generated text and edits cannot control the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def shows_progress() -> bool:
    """Return whether progress is printed, which the environment can turn off for logs."""
    return os.environ.get(PROGRESS_VARIABLE) != "none"


class PeriodicLines:
    """Prints at most one line in an interval."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._printed_at = time.monotonic()

    def print(self, line: str) -> None:
        """Print a line if the interval since the last one, or since the start, is over."""
        if time.monotonic() - self._printed_at >= self._interval:
            self._printed_at = time.monotonic()
            err.print(line)


class ProgressDisplay:
    """The current phase with the time that is left: as a bar, or as a line from time to time without a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lines = PeriodicLines(LINE_INTERVAL)
        self._task: TaskID | None = None
        self._phase = ""
        self._estimate = TimeEstimate()

    def update(self, phase: str, done: int, total: int, seconds_left: float | None = None) -> None:
        """Show a phase. Without an estimate of the whole, the time left in the phase is estimated."""
        phase = strip_control_chars(phase)
        if self._task is None or phase != self._phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._phase = self._progress.add_task(phase, total=total or None), phase
            self._estimate = TimeEstimate()
        if seconds_left is None and total:
            seconds_left = self._estimate.seconds_left(done / total)
        note = "" if seconds_left is None else f", about {format_seconds(seconds_left)} left"
        self._progress.update(self._task, description=phase + note, completed=done, total=total or None)
        if self._progress.disable and shows_progress():
            self._lines.print(f"{phase}: {done} of {total}{note}" if total else phase)


def _draws_bars() -> bool:
    return err.is_terminal and shows_progress()


@contextmanager
def progress_bar() -> Iterator[ProgressDisplay]:
    """Show progress on stderr: a bar that is removed at the end, or lines if stderr is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not _draws_bars()) as progress:
        yield ProgressDisplay(progress)


@contextmanager
def download_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show the size, speed and remaining time of a download on stderr, from its first report on; show nothing if stderr
    is not a terminal. Yield the function that takes the bytes so far and in all."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not _draws_bars()) as progress:
        task = progress.add_task(strip_control_chars(label), visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table with right-aligned numbers. A table that is too wide is transposed if that fits; otherwise its
    headings and then its texts are wrapped, never its numbers."""
    rows = [list(row) for row in rows]
    cells = [[format_cell(value) for value in row] for row in rows]
    right = _numeric_columns(rows, len(columns))
    if _table_width(columns, cells) > out.width:
        first, *others = zip(columns, *cells, strict=True)
        if _table_width(first, others) <= out.width:
            columns, cells, right = first, [list(row) for row in others], [False, *(True for _ in cells)]
        else:
            columns = [name.replace(" ", "\n") if n else name for name, n in zip(columns, right, strict=True)]
    rendered = Table(
        title=title or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(columns):
        unbroken = (
            [row[i] for row in cells] if right[i] else [word for row in cells for word in row[i].split()]
        )
        min_width = max(map(cell_len, [*unbroken, *name.split()]), default=0)
        rendered.add_column(
            name, justify="right" if right[i] else "left", overflow="fold", min_width=min_width
        )
    for row in cells:
        rendered.add_row(*map(Text, row))
    return rendered


def _numeric_columns(rows: Sequence[Sequence[Any]], columns: int) -> list[bool]:
    """Return for each column whether all of its cells are numbers."""
    return [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(columns)
    ]


def _table_width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Return the width of a table in terminal columns."""
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def format_list(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], wrapped_columns: Sequence[str] = ()
) -> Text:
    """Return a list whose ids and times are never wrapped. If the terminal is too narrow, `wrapped_columns`, which are
    the last ones, are printed below each row."""
    rows = [list(row) for row in rows]
    cells = [[format_cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    widths = [-w if n else w for w, n in zip(widths, _numeric_columns(rows, len(columns)), strict=True)]
    wrapped_count = len(wrapped_columns) if _table_width(columns, cells) > out.width else 0
    first = len(columns) - wrapped_count
    text = Text().append(_format_row(columns[:first], widths), "bold")
    text.append(f"\n    {', '.join(columns[first:])}" if wrapped_count else "")
    for row in cells:
        text.append("\n").append_text(_colour_status(columns, row, _format_row(row[:first], widths)))
        details = Text("  ·  ".join(value for value in row[first:] if value != EMPTY_CELL))
        for line in details.wrap(out, max(20, out.width - 4)) if details else ():
            line.rstrip()
            text.append("\n    ").append_text(line)
    return text


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row with padded cells; a negative width aligns to the right."""
    parts = []
    for value, width in zip(row, widths, strict=False):
        padding = " " * (abs(width) - cell_len(value))
        parts.append(padding + value if width < 0 else value + padding)
    return "  ".join(parts).rstrip()


def _colour_status(columns: Sequence[str], row: Sequence[str], line: str) -> Text:
    """Return a line of a list with a coloured status."""
    text = Text(line)
    if "status" in columns:
        status = row[columns.index("status")]
        start = line.index(status)
        text.stylize(STATUS_COLOURS.get(status.split()[0], ""), start, start + len(status))
    return text


def probability_bar(probability: float, width: int) -> str:
    """Return a probability as a bar of `width` columns; the shortest bar is an eighth of a column."""
    eighths = round(min(1.0, max(0.0, probability)) * width * 8)
    whole, part = divmod(max(eighths, 1), 8)
    return ("█" * whole + BAR_BLOCKS[part]).ljust(width)[:width]


def truncate(text: str, width: int) -> str:
    """Truncate text to `width` columns."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def print_json(value: Any) -> None:
    """Print a JSON value on one line of stdout, in ASCII, so that no character can control a terminal or split the
    line."""
    out.file.write(json.dumps(value, default=str) + "\n")


def format_seconds(seconds: float) -> str:
    """Return a duration of an estimate: seconds below two minutes, then minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def format_cell(value: Any) -> str:
    """Return the text of a table cell: a dash for None, three decimals for a small float."""
    if value is None:
        return EMPTY_CELL
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    return strip_control_chars(str(value)).replace("\n", "⏎")


def format_pairs(pairs: Mapping[str, Any]) -> str:
    """Return `name  value` lines for the values that are not None. On a terminal long values are wrapped."""
    cells = {name: format_cell(value) for name, value in pairs.items() if value is not None}
    width = max(map(len, cells), default=0)
    value_width = max(20, out.width - width - 2) if out.is_terminal else None
    return "\n".join(
        f"{name:<{width}}  " + f"\n{'':{width}}  ".join(wrap_text(value, value_width))
        for name, value in cells.items()
    )


def wrap_text(text: str, width: int | None) -> list[str]:
    """Wrap text at `width` columns."""
    return [text] if width is None else [line.plain.rstrip() for line in Text(text).wrap(out, width)] or [""]
