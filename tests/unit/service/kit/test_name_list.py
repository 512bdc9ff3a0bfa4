"""Names in an enumeration: service.kit.name_list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.kit.name_list import MAX_NAME_LENGTH, begins_with_capital, enumerated_names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (" South Korea, China, and the Philippines. They are", ["South Korea", "China", "Philippines"]),
        (" St. Louis, J. K. Rowling, Java.", ["St. Louis", "J. K. Rowling", "Java"]),
        ("1. France, 2. Spain, 3. It", ["France", "Spain"]),
        (" \u97d3\u56fd\u3001\u4e2d\u56fd\u3002\u307e\u305f", ["\u97d3\u56fd", "\u4e2d\u56fd"]),
        (' "Brave New World", "1984", *Emma*, x', ["Brave New World", "1984", "Emma"]),
        (" Paris, Paris, Rome.", ["Paris", "Rome"]),
    ],
)
def test_names_are_separated(text: str, names: list[str]) -> None:
    """Names have no articles, numbers, quotes and marks around them, and each is returned once, in any script."""
    assert enumerated_names(text) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (" South Korea, China, Ta", ["South Korea", "China"]),
        (" Paris\nRome, Berlin.", ["Paris"]),
        (" Paris, which is a city, Rome.", ["Paris"]),
        (" Paris, Rome, etc.", ["Paris", "Rome"]),
        (" Paris, a b c d e f g, Rome.", ["Paris"]),
        (" London is the capital, and Paris is another one.", []),
        ("", []),
    ],
)
def test_the_list_ends_where_prose_begins(text: str, names: list[str]) -> None:
    """A name that may be cut off at the end of the text does not count, and nothing after a line's end or an item
    that is no name."""
    assert enumerated_names(text) == names


def test_names_without_capitals_are_accepted_for_such_subjects() -> None:
    """Items in small letters are names where the subject is written so, and otherwise the beginning of prose."""
    assert enumerated_names(" viola, the cello, harp.", capital=begins_with_capital("violin")) == [
        "viola",
        "cello",
        "harp",
    ]
    assert enumerated_names(" viola, cello.", capital=begins_with_capital("Violin")) == []
    assert begins_with_capital("\u97d3\u56fd")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_usable_names(text: str) -> None:
    """No text is a fault, and no name is empty, long, or contains a separator, a line's end or a placeholder."""
    for name in enumerated_names(text, capital=False):
        assert name.strip() == name and 0 < len(name) <= MAX_NAME_LENGTH
        assert not set(name) & set(",;\n") and "{}" not in name
