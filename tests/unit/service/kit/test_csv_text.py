"""Cells of CSV that spreadsheets do not run: service.kit.csv_text."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.kit.csv_text import encode_line, neutralize, restore

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
SIGNS = st.text(st.sampled_from("'=+-@\t\r\nx"), max_size=6)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1", "''@x"])
def test_a_formula_is_neutralized(text: str) -> None:
    """A cell that a spreadsheet would run begins with an apostrophe, and is read back as it was."""
    assert neutralize(text) == f"'{text}"
    assert restore(neutralize(text)) == text


@given(TEXTS | SIGNS)
def test_a_text_is_read_back(text: str) -> None:
    """Neutralizing and restoring gives the same text, and no neutralized text begins with a sign of a formula."""
    assert restore(neutralize(text)) == text
    assert not neutralize(text).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_line_has_its_cells(cells: list[str]) -> None:
    """A line is one row for a reader of CSV, whatever a cell contains: line breaks, quotes and separators."""
    (row,) = csv.reader(io.StringIO(encode_line(cells), newline=""), strict=True)
    assert [restore(cell) for cell in row] == cells


def test_values_that_are_no_texts() -> None:
    """None is an empty cell, a truth value a word, and a negative number stays a number."""
    assert encode_line([None, True, -0.5]) == '"","true","-0.5"\r\n'
