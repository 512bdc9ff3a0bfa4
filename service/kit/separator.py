"""What stands between a prompt and its object: a space or nothing. This module does not import torch.

Two words of a script with spaces have a space between them, and text that ends with white space or an opening bracket
needs none. Elsewhere ("$" and "45", a year after Japanese text) the spelling is a custom of the texts that a model
learned: `service/models/separator_choice.py` asks the model. `separator` is the choice without a model.
"""

from __future__ import annotations

from typing import Literal

import regex

from service.kit.text import JOINED_SCRIPTS, SPACELESS_SCRIPTS

Separator = Literal["", " "]
SEPARATORS: tuple[Separator, ...] = ("", " ")

_WORD_CHARACTER = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}]--[{JOINED_SCRIPTS}]]")
_SPACELESS_CHARACTER = regex.compile(rf"(?V1)[{SPACELESS_SCRIPTS}\u30fc\u3001-\u303f\uff01-\uff5e]")
_OPENING = regex.compile(r"[\p{Ps}\p{Pi}]")
#: after these characters or before those, no space is more usual
_NO_SPACE_AFTER = regex.compile(r"(?V1)[\p{Sc}\p{Pd}\"'@#/\\_&~+*^<=|]")
_NO_SPACE_BEFORE = regex.compile(r"(?V1)[\p{Pe}\p{Pf}\p{Pd}.,;:!?%/]")


def _is(pattern: regex.Pattern[str], character: str) -> bool:
    """Return whether a character is of a class.

    By default `regex` releases the lock of the interpreter for each match. A loop over many records that does so every
    few microseconds starves the event loop, for half a second and more.
    """
    return pattern.match(character, concurrent=False) is not None


def certain_separator(prompt: str, target: str) -> Separator | None:
    """Return the separator where the characters at both sides determine it, or None where it is a matter of custom."""
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace() or _is(_OPENING, prompt[-1]):
        return ""
    if _is(_WORD_CHARACTER, prompt[-1]) and _is(_WORD_CHARACTER, target[0]):
        return " "
    if _is(_SPACELESS_CHARACTER, prompt[-1]) and _is(_SPACELESS_CHARACTER, target[0]):
        return ""
    return None


def _usual_separator(last: str, first: str) -> Separator:
    """Return the more usual separator of two characters that do not determine it."""
    has_none = (
        _is(_NO_SPACE_AFTER, last)
        or _is(_NO_SPACE_BEFORE, first)
        or _is(_SPACELESS_CHARACTER, last)
        or _is(_SPACELESS_CHARACTER, first)
    )
    return "" if has_none else " "


def separator(prompt: str, target: str) -> Separator:
    """Return the certain separator, or else the more usual one."""
    return possible_separators(prompt, target)[0]


def possible_separators(prompt: str, target: str, given: Separator | None = None) -> tuple[Separator, ...]:
    """Return the separators that can be chosen, the more usual one first: the given one, the certain one, or both."""
    if given is not None:
        return (given if prompt and not prompt[-1].isspace() else "",)
    certain = certain_separator(prompt, target)
    if certain is not None:
        return (certain,)
    return SEPARATORS if _usual_separator(prompt[-1], target[0]) == "" else SEPARATORS[::-1]
