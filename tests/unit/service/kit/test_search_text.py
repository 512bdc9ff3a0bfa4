"""What a search of edits reads: service.kit.search_text."""

from __future__ import annotations

import pytest

from service.kit.search_text import search_text, search_words

EDIT = {"subject": "Gustave  Eiffel", "prompt": "{} was born in", "target_new": "STRAẞE", "target_true": None}


@pytest.mark.parametrize(
    "query",
    ["gustave EIFFEL was", "strasse", "{} was born", "Ｅiffel born", "eiffel\tstrasse", "paris", ""],
)
def test_what_is_found(query: str) -> None:
    """A search finds words of the subject, the filled prompt and the objects, in capitals or not, in any order."""
    text = search_text(EDIT, {"target_true": "Paris"})
    assert all(word in text for word in search_words(query))


@pytest.mark.parametrize("query", ["berlin", "eiffel berlin", "Paris"])
def test_what_is_not_found(query: str) -> None:
    """A search finds nothing if one of its words is missing."""
    assert not all(word in search_text(EDIT) for word in search_words(query))


def test_an_edit_without_texts() -> None:
    """A request that lacks its fields has no text."""
    assert search_text({}) == ""
