"""The names in an enumeration that a model continued: "South Korea, China, and the Philippines." This module does not
import torch."""

from __future__ import annotations

import regex

from service.kit.answer import TERMINAL_MARK, strip_trailing_marks

MAX_NAME_WORDS = 5
MAX_NAME_LENGTH = 60  # characters
_SEPARATOR = regex.compile(r"[,;\uff0c\u3001\u060c\u0964]")
_LINE_END = regex.compile(r"[\n\r\v\f\x1c-\x1f\x85\u2028\u2029\ufffd]")
_LIST_MARK = regex.compile(r"^(?:[-*\u2022]|\d{1,3}[.)])\s+")
_LAST_ITEM = regex.compile(r"^(?:and|or)\s+", regex.IGNORECASE)
_ARTICLE = regex.compile(r"^(?:the|an?)\s+", regex.IGNORECASE)
_QUOTES = "\"'\u201c\u201d\u2018\u2019\u00ab\u00bb*_` "
#: a mark inside a name, such as in "J. K. Rowling" and "St. Louis", has a letter or a short word before it
_SENTENCE_END = regex.compile(rf"(?V1)(?<=[\p{{L}}\p{{N}}]{{3}}){TERMINAL_MARK}(?:\s|$)|[?!\u3002]")
_NOT_NAMES = {"etc", "others", "other", "more", "many others", "many more", "among others"}
_CLAUSE_WORDS = {
    "which",
    "who",
    "where",
    "when",
    "that",
    "it",
    "they",
    "this",
    "these",
    "as",
    "such",
    "including",
}
_VERBS = {"is", "are", "was", "were", "has", "have", "had"}


def enumerated_names(text: str, capital: bool = True) -> list[str]:
    """Return the names of an enumeration in their order, without articles and marks, up to its first item that is none.

    The last item counts only where a sentence ends it: it may be cut off. `capital`: in a script with capitals a name
    begins with one.
    """
    line_end = _LINE_END.search(text)
    items = _SEPARATOR.split(text if line_end is None else text[: line_end.start()])
    names: list[str] = []
    for number, item in enumerate(items):
        sentence_end = _SENTENCE_END.search(item)
        is_cut = number == len(items) - 1 and sentence_end is None and line_end is None
        name = _clean(item if sentence_end is None else item[: sentence_end.start()])
        if is_cut or not _is_name(name, capital):
            break
        names.append(name)
        if sentence_end is not None:
            break
    return list(dict.fromkeys(names))


def begins_with_capital(name: str) -> bool:
    """Whether a name begins with a capital, or with a letter of a script that has none."""
    return regex.match(r"\P{Ll}", name) is not None


def _clean(item: str) -> str:
    item = _LAST_ITEM.sub("", _LIST_MARK.sub("", item.strip()).strip(_QUOTES))
    return strip_trailing_marks(_ARTICLE.sub("", item).split(" (")[0]).strip(_QUOTES)


def _is_name(name: str, capital: bool) -> bool:
    return (
        0 < len(name) <= MAX_NAME_LENGTH
        and len(name.split()) <= MAX_NAME_WORDS
        and regex.search(r"[\p{L}\p{N}]", name) is not None
        and name.casefold() not in _NOT_NAMES
        and name.split(maxsplit=1)[0] not in _CLAUSE_WORDS
        and _VERBS.isdisjoint(name.split())
        and "{}" not in name
        and (not capital or begins_with_capital(name))
    )
