"""Comparison of an output with the output that a page shows.

Words are compared, and white space is not. `…` on a page stands for text that differs between machines or
runs: inside a word for any characters, at the end of a line for any words, alone on a line for any number of
lines. Decimal numbers match within a tolerance, and so do drawn cells and bars. A JSON output matches if it
has every field that the page shows, with the shown value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

ELLIPSIS = "…"
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")
#: characters of maps and bars in a terminal, from light to dark
SHADES, EIGHTHS = "·░▒▓█", "▏▎▍▌▋▊▉█"
DRAWING_CHARACTERS = {*SHADES, *EIGHTHS}
ABS_TOLERANCE, REL_TOLERANCE = 0.02, 0.05  # for probabilities; for larger numbers


def output_matches(expected: str, actual: str, language: str = "text") -> bool:
    """Return whether an output matches the output on the page."""
    if language == "json":
        return json_contains(json.loads(actual), json.loads(expected))
    return _lines_match(_word_lines(expected), _word_lines(actual))


def json_contains(actual: Any, expected: Any) -> bool:
    """Return whether a JSON value has every value that the page shows."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            k in actual and json_contains(actual[k], v) for k, v in expected.items()
        )
    if isinstance(expected, list):
        if not isinstance(actual, list):
            return False
        if expected[-1:] == [ELLIPSIS]:
            expected, actual = expected[:-1], actual[: len(expected) - 1]
        return len(actual) == len(expected) and all(map(json_contains, actual, expected))
    if isinstance(expected, float):
        return isinstance(actual, int | float) and _numbers_close(actual, expected)
    if isinstance(expected, str) and isinstance(actual, str):
        return _word_matches(expected, actual)
    return bool(
        expected == ELLIPSIS
        or (expected == actual and isinstance(expected, bool) == isinstance(actual, bool))
    )


def _word_lines(text: str) -> list[list[str]]:
    """Return the lines as lists of words; the length of drawn rules is ignored."""
    lines = (re.sub(r"([─━═-])\1{2,}", r"\1\1\1", line).split() for line in text.splitlines())
    return [line for line in lines if line]


def _lines_match(expected: Sequence[list[str]], actual: Sequence[list[str]]) -> bool:
    if not expected:
        return not actual
    if expected[0] == [ELLIPSIS]:
        return any(_lines_match(expected[1:], actual[at:]) for at in range(len(actual) + 1))
    return bool(actual) and _line_matches(expected[0], actual[0]) and _lines_match(expected[1:], actual[1:])


def _line_matches(expected: list[str], actual: list[str]) -> bool:
    if expected[-1] == ELLIPSIS and len(actual) >= len(expected) - 1:
        expected, actual = expected[:-1], actual[: len(expected) - 1]
    return len(expected) == len(actual) and all(map(_word_matches, expected, actual))


def _word_matches(expected: str, actual: str) -> bool:
    """Return whether two words are equal up to `…` and the last digits of numbers."""
    if ELLIPSIS in expected:
        pattern = ".*".join(re.escape(part) for part in expected.split(ELLIPSIS))
        return re.fullmatch(pattern, actual, re.DOTALL) is not None
    if set(expected) <= DRAWING_CHARACTERS and set(actual) <= DRAWING_CHARACTERS:
        return _drawing_matches(expected, actual)
    if NUMBER.sub("#", expected) != NUMBER.sub("#", actual):
        return False
    return all(
        _numbers_close(float(a), float(b))
        for a, b in zip(NUMBER.findall(actual), NUMBER.findall(expected), strict=True)
    )


def _drawing_matches(expected: str, actual: str) -> bool:
    """Return whether two maps differ by at most one shade per cell, or two bars by at most an eighth of a cell."""
    if {*expected, *actual} <= set(SHADES):
        pairs = zip(expected, actual, strict=False)
        return len(expected) == len(actual) and all(
            abs(SHADES.index(a) - SHADES.index(b)) <= 1 for a, b in pairs
        )
    return (
        abs(sum(map(EIGHTHS.find, expected)) - sum(map(EIGHTHS.find, actual)) + len(expected) - len(actual))
        <= 1
    )


def _numbers_close(actual: float, expected: float) -> bool:
    return math.isclose(actual, expected, rel_tol=REL_TOLERANCE, abs_tol=ABS_TOLERANCE)
