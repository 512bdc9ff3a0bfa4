"""Formatting of terminal output: cli.terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

import cli.terminal
from cli import terminal
from cli.terminal import format_cell, format_list, probability_bar, strip_control_chars, table, truncate


def test_control_characters_are_stripped() -> None:
    """Control characters are removed and text in any script is kept. A table cell has one line."""
    assert strip_control_chars("a\x1b]0;title\x07b\r\x9bc\n\tÎle 東京") == "a]0;titlebc\n\tÎle 東京"
    assert format_cell("a\nb") == "a⏎b"


def test_cells_are_short() -> None:
    """None is a dash. A float has three decimals, or none from 1000."""
    assert [format_cell(x) for x in (None, 0.12345, 3, 123456.7)] == ["–", "0.123", "3", "123457"]


COLUMNS = ("id", "status", "fact")
ROWS = [
    (
        "edit_01M885X4N2EA49BX8ANG0A7TNE",
        "rejected",
        "The Colosseum is located in the city of → London\x1b[2J",
    ),
    ("edit_1", "queued", None),
]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the width of the terminal."""

    def set_width(columns: int) -> None:
        monkeypatch.setattr(cli.terminal, "out", Console(width=columns, soft_wrap=True))

    return set_width


def test_a_list_is_a_line_for_each_row(screen: Callable[[int], None]) -> None:
    """On a wide terminal each row is one line, with its columns aligned below their names."""
    screen(120)
    head, *lines = format_list(COLUMNS, ROWS, ("fact",)).plain.splitlines()
    assert [line.count("  ") > 0 for line in lines] == [True, True]
    assert head.index("fact") == lines[0].index("The Colosseum") == lines[1].index("–")
    assert "\x1b" not in "".join(lines)


def test_ids_stay_whole_on_a_narrow_terminal(screen: Callable[[int], None]) -> None:
    """On a narrow terminal the flexible column is printed below its row and wrapped, and ids are not
    broken."""
    screen(60)
    lines = format_list(COLUMNS, ROWS, ("fact",)).plain.splitlines()
    assert lines[1].strip() == "fact"
    assert lines[2].split() == ["edit_01M885X4N2EA49BX8ANG0A7TNE", "rejected"]
    assert lines[3] == "    The Colosseum is located in the city of → London[2J"
    assert lines[4].split() == ["edit_1", "queued"]
    assert len(lines) == 5
    screen(36)
    assert max(map(len, format_list(COLUMNS, ROWS, ("fact",)).plain.splitlines()[3:5])) <= 36


def test_a_status_has_its_colour(screen: Callable[[int], None]) -> None:
    """A status has its colour, and only the word is coloured."""
    screen(120)
    text = format_list(COLUMNS, ROWS, ("fact",))
    found = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style != "bold"}
    assert found == {"rejected": "red", "queued": "cyan"}


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0.0, "▏   "), (1e-9, "▏   "), (0.5, "██  "), (0.53, "██▏ "), (1.0, "████"), (7.0, "████")],
)
def test_a_probability_is_a_bar(share: float, bar: str) -> None:
    """The length of the bar is proportional to the probability, at least visible and at most the width of the
    column."""
    assert probability_bar(share, 4) == bar


def test_long_text_is_truncated() -> None:
    """Text is truncated to a number of terminal columns, with an ellipsis. Wide characters count as two
    columns."""
    assert [truncate("tower", 5), truncate("towers", 5), truncate("東京東京", 5)] == [
        "tower",
        "towe…",
        "東京…",
    ]


def render_lines(made: Table, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(made)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_broad_table_is_turned(screen: Callable[[int], None]) -> None:
    """A table that is wider than the terminal is transposed."""
    names, rows = ("edits", "ES", "PS", "NS"), [(50, 0.9, 0.8, 0.7), (100, 0.6, None, 0.5)]
    screen(26)
    assert render_lines(table("", names, rows), 26)[2] == "   50  0.900  0.800  0.700"
    screen(25)
    lines = render_lines(table("", names, rows), 25)
    assert [lines[0], *lines[2:]] == [
        "edits     50    100",
        "ES     0.900  0.600",
        "PS     0.800      –",
        "NS     0.700  0.500",
    ]


def test_a_table_keeps_its_numbers_whole(screen: Callable[[int], None]) -> None:
    """A table that is too wide also when transposed has its headings and texts wrapped. Numbers are not
    broken."""
    screen(40)
    rows = [("layers=[1,2] clamp=1.5", 0.123, 1234.5)] * 5
    lines = render_lines(table("", ("tried", "rise of loss", "S at once"), rows), 40)
    assert max(map(len, lines)) <= 40
    assert sum("0.123" in line and "1234" in line for line in lines) == 5
    assert [line.split() for line in lines[:3]] == [["rise", "S"], ["of", "at"], ["tried", "loss", "once"]]


def test_progress_without_a_terminal_is_a_line_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log gets the phase, the number of parts and the estimated time left, at most once in an interval."""
    clock = iter(range(0, 10_000, 3))  # each look at the clock is three seconds later
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with terminal.progress_bar() as display:
        for done in range(12):
            display.update("edits", done, 12)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 12
    assert all(re.fullmatch(r"edits: \d+ of 12, about \d+ s left", line) for line in lines)


def test_quick_progress_without_a_terminal_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Work that ends within the interval leaves no line."""
    with terminal.progress_bar() as display:
        display.update("edits", 1, 2)
    assert capsys.readouterr().err == ""


def test_progress_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With PALIMPSEST_PROGRESS=none even long work prints no progress."""
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setenv("PALIMPSEST_PROGRESS", "none")
    with terminal.progress_bar() as display:
        for done in range(12):
            display.update("edits", done, 12)
    assert capsys.readouterr().err == ""
