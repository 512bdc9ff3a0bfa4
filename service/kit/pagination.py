"""Lists in pages: a cursor holds the last id or version of the page before, and nobody needs to know that."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TypeVar

from service.errors import InvalidInput

#: what a cursor holds
CursorValue = TypeVar("CursorValue", str, int)
MAX_PAGE_SIZE = 200


def validate_limit(limit: int) -> None:
    """Refuse pages that are empty or too long."""
    if not 1 <= limit <= MAX_PAGE_SIZE:
        raise InvalidInput(f"`limit` must be from 1 to {MAX_PAGE_SIZE}.", "limit")


def encode_cursor(last: str | int) -> str:
    """The cursor of the page after this id or version."""
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, kind: type[CursorValue]) -> CursorValue | None:
    """What a cursor of that kind holds; None for the first page."""
    if cursor is None:
        return None
    try:
        last = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError):
        last = None
    odd = isinstance(last, str) and not (last.isascii() and "\x00" not in last)
    huge = isinstance(last, int) and not 0 <= last < 2**63
    if type(last) is not kind or odd or huge:
        raise invalid_cursor()
    return last


def invalid_cursor() -> InvalidInput:
    return InvalidInput("this cursor is not one that this list gave: start without one.", "cursor")
