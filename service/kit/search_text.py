"""The text of an edit that a search reads, and the words of a search, in the same form."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from service.kit.text import PLACEHOLDER, normalize_whitespace

MAX_QUERY = 200  #: characters of a search
_FIELDS = ("subject", "target_new", "target_true")


def search_text(request: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> str:
    """Return the subject, the prompt with the subject filled in, and the objects of an edit.

    `result` adds the true object that the model says, where the request names none.
    """
    subject, prompt = str(request.get("subject") or ""), str(request.get("prompt") or "")
    texts = [request.get(name) for name in _FIELDS]
    texts += [prompt.replace(PLACEHOLDER, subject), (result or {}).get("target_true")]
    folded = dict.fromkeys(fold_text(str(text)) for text in texts if text)
    return "\n".join(folded)


def search_words(query: str) -> list[str]:
    """Return the words of a search. A text is found if it contains all of them, in any order. `{}` is no word."""
    return list(dict.fromkeys(word for word in fold_text(query).split() if word != PLACEHOLDER))


def fold_text(text: str) -> str:
    """Return a text without the differences that a search ignores: capitals, widths and white space."""
    return normalize_whitespace(unicodedata.normalize("NFKC", text).casefold())
