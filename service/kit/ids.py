"""Ids that sort by time: a prefix that says what it names, and a ULID."""

from __future__ import annotations

import secrets
import threading
import time
from contextvars import ContextVar

#: the id of the HTTP request that is being answered, here or for a worker; "" where there is none
request_id: ContextVar[str] = ContextVar("request_id", default="")

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
_RANDOM_BITS = 80


class _UlidGenerator:
    """128 bits each, 48 of milliseconds and 80 of chance, and each greater than the one before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        with self._lock:
            candidate = (time.time_ns() // 1_000_000 << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
            self._last = max(self._last + 1, candidate)
            return self._last


_ulid_generator = _UlidGenerator()


def new_id(prefix: str) -> str:
    """A fresh id, such as "edit_01J...", greater than every earlier one of its prefix in this process."""
    value = _ulid_generator.next()
    # 26 digits, most significant first, so that text sorts as the number does
    return f"{prefix}_{''.join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))}"


def prefix_of(id: str) -> str:
    """What an id names: its prefix."""
    return id.partition("_")[0]


def created_at(id: str) -> float | None:
    """When an id was made, in seconds by the clock of whoever made it; None when it is not one of ours."""
    digits = id.rpartition("_")[2]
    if len(digits) != 26 or not set(digits) <= set(_ALPHABET):
        return None
    milliseconds = 0
    for digit in digits[:10]:
        milliseconds = milliseconds * 32 + _ALPHABET.index(digit)
    return milliseconds / 1000
