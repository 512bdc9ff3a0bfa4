"""Facts as sentences: service.kit.statement_sentence."""

from __future__ import annotations

import pytest

from service.kit.statement_sentence import statement_sentence


@pytest.mark.parametrize(
    ("prompt", "between", "target", "sentence"),
    [
        ("The capital of France is", " ", "Rome", "The capital of France is Rome."),
        ("It works at", " ", "Yahoo!", "It works at Yahoo!"),
        ("It ends", " ", "here. ", "It ends here."),
        ("富士山は", "", "日本にある。", "富士山は日本にある。"),
        ("He said (", "", "no)", "He said (no)."),
    ],
)
def test_sentence_ends_in_one_full_stop(prompt: str, between: str, target: str, sentence: str) -> None:
    """A full stop is added where the object does not end in punctuation."""
    assert statement_sentence(prompt, between, target) == sentence
