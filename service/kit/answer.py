"""The object at the beginning of a model's answer. This module does not import torch."""

from __future__ import annotations

import regex

from service.kit.text import SPACELESS_SCRIPTS

MAX_WORDS = 6  # of an object; more words before a boundary are a clause
CHARACTERS_AHEAD = 3  # of a mark, on which it depends whether it is a boundary
_ELLIPSIS = "\u2026"
#: what ends a sentence, a clause or an item of a list, in any script; a word space of Ethiopic is one of these marks
#: in Unicode, and is a space here
TERMINAL_MARK = rf"[\p{{Terminal_Punctuation}}{_ELLIPSIS}--\u1361]"
# Word boundaries of Unicode (UAX #29, WB6, WB7, WB11, WB12): these marks can lie inside a word or a number.
_INSIDE_A_WORD = r"(?<=\p{L})[\p{WB=MidLetter}\p{WB=MidNumLet}](?=\p{L})"
_INSIDE_A_NUMBER = r"(?<=\p{Nd})[\p{WB=MidNum}\p{WB=MidNumLet}:](?=\p{Nd})"
_SPACELESS = SPACELESS_SCRIPTS + r"\u30fc"
_ABBREVIATION = r"(?:St|Mt|Ft|Mr|Mrs|Ms|Dr|Prof|Gen|Col|Capt|Lt|Sgt)"  # before a name
#: a full stop after an initial ("J. K. Rowling", "George W. Bush") or an abbreviation, when a name follows
_BEFORE_A_NAME = rf"(?:(?:(?<=^(?:\p{{Lu}}\.)*\p{{Lu}})|(?<=\p{{Lu}}[\p{{L}}.]*\s\p{{Lu}})|(?<=\b{_ABBREVIATION}))\.(?=\s\p{{Lu}}))"
_INITIALISM_END = regex.compile(r"(?<=\.\p{L})\.")  # "U.S.", "D.C."
_NOT_A_BOUNDARY = regex.compile(rf"(?V1){_INSIDE_A_WORD}|{_INSIDE_A_NUMBER}|{_BEFORE_A_NAME}")
_BOUNDARY = regex.compile(
    rf"(?V1){TERMINAL_MARK}"
    r"|[\n\r\v\f\x1c-\x1f\x85\u2028\u2029\ufffd]"  # a line's end; a character whose other bytes are missing
    r"|(?<=\S)\s*[\p{Ps}]"  # an addition in brackets
    r"|\u00b7(?=\s)"  # a Greek semicolon as Unicode normalizes it
    r"|\s+\p{Pd}+\s|\u2014|--+"  # an addition after a dash
    rf"|(?<=[{_SPACELESS}])\s"
)
_TRAILING_MARKS = regex.compile(rf"(?V1)(?:\s|{TERMINAL_MARK})+\Z")
_IS_SPACELESS = regex.compile(rf"[{_SPACELESS}]")
_FIRST_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]+|[^\s{_SPACELESS}]+")
_RUN_OF_ONE_SCRIPT = regex.compile(r"(?V1)\p{Han}+|[\p{Katakana}\u30fc]+|\p{Hiragana}+|\X")


def answer_object(answer: str, complete: bool = False) -> str:
    """Return the object that an answer begins with: the text before its first natural boundary, in any script.

    Without a boundary it is the whole answer if that is `complete`. Otherwise, and after more than `MAX_WORDS` words,
    the answer is a clause that may run on for any length, and its first word is the object; where no spaces separate
    words, the first characters of one script. The object is empty if the answer begins with a boundary.
    """
    text = answer.lstrip(" \t\u3000")
    end = _first_boundary(text)
    first_part = text[:end].strip()
    runs_on = end is None and not complete
    return _first_word(text) if runs_on or len(first_part.split()) > MAX_WORDS else first_part


def is_object_certain(answer: str) -> bool:
    """Whether every longer answer that begins with this one has the same object: it has a boundary, and behind it the
    characters that could show that an earlier mark is none, or that this one is not."""
    text = answer.lstrip(" \t\u3000")
    end = _first_boundary(text)
    return end is not None and len(text) - end > CHARACTERS_AHEAD


def strip_trailing_marks(text: str) -> str:
    """Return a text without the white space and the marks at its end that end a sentence or a clause."""
    return str(_TRAILING_MARKS.sub("", text))


def _first_boundary(text: str) -> int | None:
    for mark in _BOUNDARY.finditer(text):
        if _NOT_A_BOUNDARY.match(text, mark.start()):
            continue
        is_initialism = _INITIALISM_END.match(text, mark.start())
        return int(mark.end() if is_initialism else mark.start())
    return None


def _first_word(text: str) -> str:
    word = _FIRST_WORD.match(text)
    if word is None:
        return ""
    run = _RUN_OF_ONE_SCRIPT.match(word[0]) if _IS_SPACELESS.match(word[0]) else word
    return str(run[0])
