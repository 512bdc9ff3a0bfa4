"""Wrapping of a text that arrives in pieces: no word is broken, and nothing waits longer than its word."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


class WordWrapper:
    """Returns the pieces of a text with line breaks, for lines of `width` columns; None wraps nothing."""

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._waiting = ""  # the last word, which the next piece may continue, with the white space before it

    def feed(self, piece: str) -> str:
        """Return what can be printed after this piece."""
        if self._width is None:
            return piece
        parts = _PARTS.findall(self._waiting + piece)
        self._waiting = ""
        if parts and parts[-1] != "\n":
            self._waiting = parts.pop()
            if not self._waiting.isspace() and parts and parts[-1] != "\n":
                self._waiting = parts.pop() + self._waiting
        return self._place(parts)

    def flush(self) -> str:
        """Return the rest at the end of the text."""
        parts, self._waiting = _PARTS.findall(self._waiting), ""
        return self._place(parts)

    def _place(self, parts: list[str]) -> str:
        placed = ""
        space = ""
        for part in parts:
            if part == "\n":
                placed, self._column, space = placed + part, 0, ""
            elif part.isspace():
                space = part
            else:
                needed = cell_len(space) + cell_len(part)
                if self._width is not None and self._column and self._column + needed > self._width:
                    placed, self._column, space = placed + "\n", 0, ""
                placed += space + part
                self._column += cell_len(space) + cell_len(part)
                space = ""
        return placed + space
