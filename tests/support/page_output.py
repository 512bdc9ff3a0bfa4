"""Whether what came is what a page shows.

Words are compared and not the space between them. What differs from one machine or run to the next is written `…`: inside a word
for some characters, at the end of a line for any words, alone on a line for any number of lines. Numbers with a point agree when they are near each other,
and so do drawn cells and bars. An output that is
shown as JSON shows a part of the answer: every field that is shown is there, and says that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

ANY = "…"
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?")
#: what maps and bars are drawn with in a terminal, from little ink to much
SHADES, EIGHTHS = "·░▒▓█", "▏▎▍▌▋▊▉█"
INK = {*SHADES, *EIGHTHS}
NEAR, SHARE = 0.02, 0.05  # of two probabilities; of two larger numbers


def same(shown: str, came: str, language: str = "text") -> bool:
    """Whether an output is as the page shows it."""
    if language == "json":
        return contains(json.loads(came), json.loads(shown))
    return _lines(_words(shown), _words(came))


def contains(came: Any, shown: Any) -> bool:
    """Whether a JSON value has all that is shown of it."""
    if isinstance(shown, dict):
        return isinstance(came, dict) and all(k in came and contains(came[k], v) for k, v in shown.items())
    if isinstance(shown, list):
        if not isinstance(came, list):
            return False
        if shown[-1:] == [ANY]:
            shown, came = shown[:-1], came[: len(shown) - 1]
        return len(came) == len(shown) and all(map(contains, came, shown))
    if isinstance(shown, float):
        return isinstance(came, int | float) and _near(came, shown)
    if isinstance(shown, str) and isinstance(came, str):
        return _word(shown, came)
    return bool(shown == ANY or (shown == came and isinstance(shown, bool) == isinstance(came, bool)))


def _words(text: str) -> list[list[str]]:
    """Lines of words; a drawn rule is as long as it likes."""
    lines = (re.sub(r"([─━═-])\1{2,}", r"\1\1\1", line).split() for line in text.splitlines())
    return [line for line in lines if line]


def _lines(shown: Sequence[list[str]], came: Sequence[list[str]]) -> bool:
    if not shown:
        return not came
    if shown[0] == [ANY]:
        return any(_lines(shown[1:], came[at:]) for at in range(len(came) + 1))
    return bool(came) and _line(shown[0], came[0]) and _lines(shown[1:], came[1:])


def _line(shown: list[str], came: list[str]) -> bool:
    if shown[-1] == ANY and len(came) >= len(shown) - 1:
        shown, came = shown[:-1], came[: len(shown) - 1]
    return len(shown) == len(came) and all(map(_word, shown, came))


def _word(shown: str, came: str) -> bool:
    """Equal but for `…` and for the last digits of numbers."""
    if ANY in shown:
        pattern = ".*".join(re.escape(part) for part in shown.split(ANY))
        return re.fullmatch(pattern, came, re.DOTALL) is not None
    if set(shown) <= INK and set(came) <= INK:
        return _drawn(shown, came)
    if NUMBER.sub("#", shown) != NUMBER.sub("#", came):
        return False
    return all(
        _near(float(a), float(b)) for a, b in zip(NUMBER.findall(came), NUMBER.findall(shown), strict=True)
    )


def _drawn(shown: str, came: str) -> bool:
    """Cells of a map, each a shade off at most; or bars, one as long as the other but for an eighth of a cell."""
    if {*shown, *came} <= set(SHADES):
        pairs = zip(shown, came, strict=False)
        return len(shown) == len(came) and all(abs(SHADES.index(a) - SHADES.index(b)) <= 1 for a, b in pairs)
    return abs(sum(map(EIGHTHS.find, shown)) - sum(map(EIGHTHS.find, came)) + len(shown) - len(came)) <= 1


def _near(came: float, shown: float) -> bool:
    return math.isclose(came, shown, rel_tol=SHARE, abs_tol=NEAR)
