"""Ids that sort by time: the kind of resource as a prefix, and a ULID.

The generator is local because an id must exceed all earlier ids of the process, also after the clock is set back.
"""

from __future__ import annotations

import secrets
import threading
import time
from contextvars import ContextVar

#: id of the HTTP request that is being processed, in the API or a worker; "" outside a request
request_id: ContextVar[str] = ContextVar("request_id", default="")

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
_RANDOM_BITS = 80


class _UlidGenerator:
    """Strictly increasing 128-bit values: 48 bits of milliseconds and 80 random bits."""

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
    """Return a new id such as "edit_01J...", greater than every earlier one with its prefix in this process."""
    value = _ulid_generator.next()
    # 26 digits, most significant first, so that the text sorts like the number
    return f"{prefix}_{''.join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))}"


def prefix_of(id: str) -> str:
    """Return the prefix of an id, the kind of its resource."""
    return id.partition("_")[0]


def created_at(id: str) -> float | None:
    """Return the Unix time in seconds at which an id was generated; None for a text that is not such an id."""
    digits = id.rpartition("_")[2]
    if len(digits) != 26 or not set(digits) <= set(_ALPHABET):
        return None
    milliseconds = 0
    for digit in digits[:10]:
        milliseconds = milliseconds * 32 + _ALPHABET.index(digit)
    return milliseconds / 1000
