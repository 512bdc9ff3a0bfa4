"""Names in texts: service.kit.names_in_text."""

from __future__ import annotations

import pytest

from service.kit.names_in_text import NameFinder


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        (["Paris"], "He lives in paris.", True),
        (["Paris"], "A Parisian street", False),
        (["Paris"], "comparison", False),
        (["Big  Ben"], "where is Big\nBen?", True),
        (["Big Ben"], "BigBen", False),
        (["富士山"], "富士山は日本にある", True),
        (["C++"], "In C++ one writes", True),
        (["São Paulo"], "são paulo lies in Brazil", True),
        (["x", "Big Ben"], "Big Ben", True),
        (["a.b"], "axb", False),
        ([], "anything", False),
        ([" "], "a text", False),
    ],
)
def test_names_are_found_as_whole_words_in_any_case(names: list[str], text: str, found: bool) -> None:
    """A name is found with any white space and in any case, but not inside another word."""
    assert NameFinder(names).is_in(text) is found
