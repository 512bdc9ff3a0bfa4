"""What the terminal shows."""

from __future__ import annotations

from rich.text import Text

from cli.screen import cell, heat_map, plain


def colours(text: Text) -> list[str]:
    return [str(span.style).removeprefix("on ") for span in text.spans]


def test_nothing_from_outside_steers_the_terminal() -> None:
    """Control characters are dropped, text in any script stays; a table's cell is one line."""
    assert plain("a\x1b]0;title\x07b\r\x9bc\n\tÎle 東京") == "a]0;titlebc\n\tÎle 東京"
    assert cell("a\nb") == "a⏎b"


def test_cells_are_short() -> None:
    """Nothing is a dash; a number has three digits after the point."""
    assert [cell(x) for x in (None, 0.12345, 3, 123456.7)] == ["–", "0.123", "3", "123457"]


def test_low_is_white_and_high_is_full() -> None:
    """A block per score: white at `low`, the full colour at `high`, in between in proportion; never beyond."""
    text = heat_map("hidden", ["a", "bb"], [[0.1, 0.9], [0.5, -1.0]], 0.1, 0.9, range(1, 2))
    assert colours(text) == ["#ffffff", "#58188c", "#ac8cc6", "#ffffff"]
    lines = text.plain.splitlines()
    assert [lines[0][:4], lines[1][:4]] == ["  a ", "bb* "]
    assert lines[2].split() == ["0", "1", "layer"]


def test_without_colours_there_is_ink() -> None:
    """In a file a map is drawn with characters of more or less ink."""
    text = heat_map("mlp", ["a"], [[0.0, 0.5, 1.0]], 0.0, 1.0, range(0), coloured=False)
    assert text.plain.splitlines()[0] == "a   ▒▒██"
    assert colours(text) == []


def test_a_flat_map_is_white() -> None:
    """Where nothing differs there is nothing to show, and nothing to divide by."""
    assert colours(heat_map("mlp", ["a"], [[0.5]], 0.5, 0.5, range(0))) == ["#ffffff"]
