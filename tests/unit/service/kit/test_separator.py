"""Tests of service.kit.separator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.kit.separator import SEPARATORS, Separator, certain_separator, possible_separators, separator

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
TOKYO, BANGKOK, SEOUL = "\u6771\u4eac", "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e", "\uc11c\uc6b8"


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The city of", "Rome", " "),
        ("In the year", "1999", " "),
        ("\u0413\u043e\u0440\u043e\u0434", "\u041c\u043e\u0441\u043a\u0432\u0430", " "),
        ("The city of ", "Rome", ""),
        ("The city of\n", "Rome", ""),
        ("The city of", " Rome", ""),
        ("\u9996\u90fd\u306f", TOKYO, ""),
        ("\u30ad\u30fc", TOKYO, ""),
        ("\u9996\u90fd\u306f\uff1a", TOKYO, ""),
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07", BANGKOK, ""),
        ("She said \u201c", "yes", ""),
        ("f(", "x", ""),
        ("", "Rome", ""),
    ],
)
def test_the_characters_at_both_sides_determine_it(prompt: str, target: str, between: str) -> None:
    """Between two words of a script with spaces there is one; after white space, an opening bracket or quote, and
    between characters of a script without spaces there is none."""
    assert certain_separator(prompt, target) == between == separator(prompt, target)
    assert possible_separators(prompt, target) == (between,)


@pytest.mark.parametrize(
    ("prompt", "target", "usual"),
    [
        ("It costs $", "45", ""),
        ("The movement is anti-", "war", ""),
        ("Write to @", "anna", ""),
        ("It was made in\u306e", "1999\u5e74", ""),
        ("Tokyo is", TOKYO, ""),
        ("\uc218\ub3c4\ub294", SEOUL, " "),
        ("Answer:", "Rome", " "),
        ("She said,", "yes", " "),
    ],
)
def test_elsewhere_both_are_possible(prompt: str, target: str, usual: str) -> None:
    """Where spelling is a custom both separators are possible, and the more usual one is the first."""
    assert certain_separator(prompt, target) is None
    assert separator(prompt, target) == usual
    assert possible_separators(prompt, target)[0] == usual
    assert sorted(possible_separators(prompt, target)) == sorted(SEPARATORS)


@given(TEXT, TEXT, st.sampled_from(SEPARATORS))
def test_a_given_separator_is_the_only_possible_one(prompt: str, target: str, chosen: Separator) -> None:
    """What a request names is used for any characters, except a second white space after the prompt."""
    doubled = not prompt or prompt[-1].isspace()
    assert possible_separators(prompt, target, chosen) == ("" if doubled else chosen,)
    assert separator(prompt, target) in possible_separators(prompt, target)
