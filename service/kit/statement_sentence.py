"""A fact as a sentence."""

from __future__ import annotations

import unicodedata


def statement_sentence(prompt: str, between: str, target: str) -> str:
    """Return a prompt with its object as a sentence: with a full stop, unless the object ends in punctuation."""
    sentence = prompt + between + target.rstrip()
    return sentence if unicodedata.category(sentence[-1]) == "Po" else sentence + "."
