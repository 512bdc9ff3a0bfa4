"""What stands between a prompt and its object: a space or nothing. This module does not import torch.

Two words of a script with spaces have a space between them, and text that ends with white space or an opening bracket
needs none. Elsewhere ("$" and "45", a year after Japanese text) the spelling is a custom of the texts that a model
learned: `service/models/separator_choice.py` asks the model. `separator` is the choice without a model.
"""

from __future__ import annotations

from typing import Literal

import regex

from service.kit.text import JOINED_SCRIPTS

Separator = Literal["", " "]
SEPARATORS: tuple[Separator, ...] = ("", " ")

_SPACELESS = rf"[{JOINED_SCRIPTS}--\p{{Hangul}}]"
_WORD_CHARACTER = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}]--[{JOINED_SCRIPTS}]]")
_SPACELESS_CHARACTER = regex.compile(rf"(?V1)[{_SPACELESS}\u30fc\u3001-\u303f\uff01-\uff5e]")
_OPENING = regex.compile(r"[\p{Ps}\p{Pi}]")
#: after these characters or before those, no space is more usual
_NO_SPACE_AFTER = regex.compile(r"(?V1)[\p{Sc}\p{Pd}\"'@#/\\_&~+*^<=|]")
_NO_SPACE_BEFORE = regex.compile(r"(?V1)[\p{Pe}\p{Pf}\p{Pd}.,;:!?%/]")


def certain_separator(prompt: str, target: str) -> Separator | None:
    """Return the separator where the characters at both sides determine it, or None where it is a matter of custom."""
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace() or _OPENING.match(prompt[-1]):
        return ""
    if _WORD_CHARACTER.match(prompt[-1]) and _WORD_CHARACTER.match(target[0]):
        return " "
    if _SPACELESS_CHARACTER.match(prompt[-1]) and _SPACELESS_CHARACTER.match(target[0]):
        return ""
    return None


def separator(prompt: str, target: str) -> Separator:
    """Return the certain separator, or else the more usual one."""
    certain = certain_separator(prompt, target)
    if certain is not None:
        return certain
    last, first = prompt[-1], target[0]
    unusual = _NO_SPACE_AFTER.match(last) or _NO_SPACE_BEFORE.match(first)
    return "" if unusual or _SPACELESS_CHARACTER.match(last) or _SPACELESS_CHARACTER.match(first) else " "


def possible_separators(prompt: str, target: str, given: Separator | None = None) -> tuple[Separator, ...]:
    """Return the separators that can be chosen, the more usual one first: the given one, the certain one, or both."""
    if given is not None:
        return (given if prompt and not prompt[-1].isspace() else "",)
    usual = separator(prompt, target)
    return (
        (usual,)
        if certain_separator(prompt, target) is not None
        else tuple(sorted(SEPARATORS, key=usual.__ne__))
    )
