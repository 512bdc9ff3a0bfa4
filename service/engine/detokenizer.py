"""Incremental detokenization with stop strings.

A piece never ends inside a character, contains no stop string, and holds back text that may be the beginning of one.
The concatenation of the pieces is the text.

`tokenizers.decoders.DecodeStream` is not used: with a prompt as its prefix it emits the prompt's incomplete characters
with the first token, it raises for byte-fallback tokenizers, and it does not expose the pending text that offsets need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.models.token_text import REPLACEMENT_CHARACTER

PROMPT_CONTEXT_TOKENS = 8  # last prompt tokens, which decide whether the first new token has a leading space


def find_first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop string begins that is complete first when the text is read character by character."""
    matches = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(matches)[1] if matches else None


def partial_stop_length(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of the text may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def common_prefix(a: str, b: str) -> str:
    """Return the longest common prefix of two texts."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


class Detokenizer:
    """The text of one sequence. `text` is the text emitted so far."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids = list(prompt[-PROMPT_CONTEXT_TOKENS:])
        self._prefix_offset = 0  # ids[:_read_offset] are in the text; decoding starts one piece earlier
        self._read_offset = len(self._ids)
        self._pending = ""

    def start_offset(self, token: int) -> int:
        """Return the character of the text at which a token would begin if it were pushed now."""
        prefix = self._decode(self._ids[self._prefix_offset : self._read_offset])
        before, after = (
            self._new_text(),
            self._decode([*self._ids[self._prefix_offset :], token])[len(prefix) :],
        )
        shared = (
            before.rstrip(REPLACEMENT_CHARACTER)
            if after.endswith(REPLACEMENT_CHARACTER)
            else common_prefix(before, after)
        )
        return len(self.text) + len(self._pending) + len(shared)

    def push(self, token: int) -> str:
        """Append a token and return the text that can be emitted now."""
        self._ids.append(token)
        return self._emit(self._take_complete_text())

    def flush(self) -> str:
        """Return the text that was held back, after the last token. An incomplete character is dropped."""
        if self.stopped:
            return ""
        piece = self._emit(self._new_text().rstrip(REPLACEMENT_CHARACTER))
        rest, self._pending, self._ids = self._pending, "", []
        self.text += rest
        return piece + rest

    def _take_complete_text(self) -> str:
        """Return the text of the new ids, or nothing while it ends inside a character."""
        new = self._new_text()
        if not new or new.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._prefix_offset, self._read_offset = self._read_offset, len(self._ids)
        return new

    def _new_text(self) -> str:
        """Return the text of the ids that are not in the text yet, decoded after the previous piece."""
        before = self._decode(self._ids[self._prefix_offset : self._read_offset])
        return self._decode(self._ids[self._prefix_offset :])[len(before) :]

    def _emit(self, new: str) -> str:
        """Add new text and return the part that cannot belong to a stop string."""
        text = self._pending + new
        stop_at = find_first_stop(text, self._stops)
        if stop_at is not None:
            self.stopped = True
            piece, self._pending = text[:stop_at], ""
        else:
            cut = len(text) - partial_stop_length(text, self._stops)
            piece, self._pending = text[:cut], text[cut:]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(  # type: ignore[no-any-return]
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
