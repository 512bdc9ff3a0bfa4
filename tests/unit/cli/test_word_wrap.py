"""cli.word_wrap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.word_wrap import WordWrapper

TEXT = "The capital of Japan is Oslo, the\nlargest city.\n\n  Indented, and one_very_long_word_without_end."


def wrap(pieces: list[str], width: int | None) -> str:
    wrapper = WordWrapper(width)
    return "".join([*map(wrapper.feed, pieces), wrapper.flush()])


def test_lines_break_between_words() -> None:
    """A line has at most `width` columns unless one word is longer; the text's own lines and indentation stay."""
    assert wrap([TEXT], 16).split("\n") == [
        "The capital of", "Japan is Oslo,", "the", "largest city.", "", "  Indented, and",
        "one_very_long_word_without_end.",
    ]  # fmt: skip
    assert wrap(["日本 の 首都"], 8) == "日本 の\n首都"  # a character of two columns


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(5, 40))
def test_pieces_are_wrapped_as_the_whole(sizes: list[int], width: int) -> None:
    """Wherever a text is cut into pieces, its lines are those of the whole text."""
    pieces, rest = [], TEXT
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert wrap([*pieces, rest], width) == wrap([TEXT], width)


@pytest.mark.parametrize("text", [TEXT, " a  b ", "\n", ""])
def test_without_a_width_nothing_changes(text: str) -> None:
    """Without a width the text is the same, and wrapping changes only white space."""
    assert wrap(list(text), None) == text
    assert wrap(list(text), 10).split() == text.split()
