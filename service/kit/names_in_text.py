"""Whether a text contains one of some names, in any case and with any white space between its words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from service.kit.text import normalize_whitespace

_LETTER = "[0-9A-Za-z]"  # scripts without spaces between words have no such edges


class NameFinder:
    """Finds names as whole words, where their first and last characters are Latin letters or digits."""

    def __init__(self, names: Iterable[str]) -> None:
        patterns = [_pattern(words) for name in names if (words := normalize_whitespace(name))]
        self._pattern = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)

    def is_in(self, text: str) -> bool:
        """Return whether a text contains one of the names."""
        return self._pattern.search(text) is not None


def _pattern(name: str) -> str:
    words = r"\s+".join(map(re.escape, name.split(" ")))
    before = f"(?<!{_LETTER})" if re.match(_LETTER, name) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, name[-1]) else ""
    return f"{before}{words}{after}"
