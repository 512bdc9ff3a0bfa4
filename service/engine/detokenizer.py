"""Token ids -> text that may be shown, piece by piece.

A piece never ends inside a character, never holds a stop string, and never runs ahead of text that may still turn out
to be the beginning of one. The pieces together are the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.models.token_text import UNKNOWN

CONTEXT = 8  # tokens of the prompt that decide how the first new token is written (a leading space or none)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first when the text is read character by character."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def both_begin(a: str, b: str) -> str:
    """What two texts begin with alike."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


class Detokenizer:
    """The text of one row. `text` is all that has been given out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids = list(prompt[-CONTEXT:])
        self._known = 0  # ids[:read] are in the text; decoding starts at `known`, one piece before
        self._read = len(self._ids)
        self._held = ""

    def begins(self, token: int) -> int:
        """The character of the text at which a token begins that is pushed now: that one which it helps to write."""
        known = self._decode(self._ids[self._known : self._read])
        before, after = self._new(), self._decode([*self._ids[self._known :], token])[len(known) :]
        shared = before.rstrip(UNKNOWN) if after.endswith(UNKNOWN) else both_begin(before, after)
        return len(self.text) + len(self._held) + len(shared)

    def push(self, token: int) -> str:
        """Take a token; give out what can be shown now."""
        self._ids.append(token)
        return self._give(self._complete())

    def end(self) -> str:
        """No token follows: give out what was held back. A character that was never completed is left out."""
        if self.stopped:
            return ""
        piece = self._give(self._new().rstrip(UNKNOWN))
        rest, self._held, self._ids = self._held, "", []
        self.text += rest
        return piece + rest

    def _complete(self) -> str:
        """Text of the new ids, or nothing while it ends inside a character."""
        new = self._new()
        if not new or new.endswith(UNKNOWN):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return new

    def _new(self) -> str:
        """What the ids say that are not in the text yet, written after the piece before them."""
        before = self._decode(self._ids[self._known : self._read])
        return self._decode(self._ids[self._known :])[len(before) :]

    def _give(self, new: str) -> str:
        """Pass on what no stop string can claim any more."""
        text = self._held + new
        at = first_stop(text, self._stops)
        if at is not None:
            self.stopped = True
            piece, self._held = text[:at], ""
        else:
            cut = len(text) - held_back(text, self._stops)
            piece, self._held = text[:cut], text[cut:]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(  # type: ignore[no-any-return]
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
