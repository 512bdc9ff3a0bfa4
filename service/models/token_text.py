"""The text of a single token, independent of its neighbors; bytes where the token is a part of a character."""

from __future__ import annotations

import re
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"  # a decoder writes it for an incomplete character
# Decoded before a token, so that a tokenizer that trims the beginning of a text does not trim the token.
CONTEXT_LETTER = "a"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte in the vocabularies of SentencePiece


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of GPT-2's byte vocabulary: printable bytes are themselves, the others start at
    256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()


class TokenTextCache:
    """The text of each token of a tokenizer, computed on first use."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context_ids: list[int] = tokenizer(CONTEXT_LETTER, add_special_tokens=False)["input_ids"]
        self._texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._compute_text(token)
        return self._texts[token]

    def _compute_text(self, token: int) -> str:
        text = self._decode([*self._context_ids, token])[len(self._decode(self._context_ids)) :]
        if REPLACEMENT_CHARACTER not in text:
            return text
        vocabulary_entry = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte_match := _BYTE.fullmatch(vocabulary_entry):
            return f"bytes:\\x{byte_match[1].lower()}"
        if any(letter not in BYTE_OF_LETTER for letter in vocabulary_entry):
            return text
        return "bytes:" + "".join(f"\\x{BYTE_OF_LETTER[letter]:02x}" for letter in vocabulary_entry)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(  # type: ignore[no-any-return]
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
