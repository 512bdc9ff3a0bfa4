"""Cursor pagination. A cursor is opaque to clients and encodes the last id or version of the previous page."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TypeVar

from service.errors import InvalidInput

#: type of the value in a cursor
CursorValue = TypeVar("CursorValue", str, int)
MAX_PAGE_SIZE = 200


def validate_limit(limit: int) -> None:
    """Raise InvalidInput for a page size outside 1 to MAX_PAGE_SIZE."""
    if not 1 <= limit <= MAX_PAGE_SIZE:
        raise InvalidInput(f"`limit` must be from 1 to {MAX_PAGE_SIZE}.", "limit")


def encode_cursor(last: str | int) -> str:
    """Return the cursor of the page after this id or version."""
    return base64.urlsafe_b64encode(json.dumps(last).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, kind: type[CursorValue]) -> CursorValue | None:
    """Return the value of a cursor; None for the first page. Raises InvalidInput for an invalid cursor."""
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
    """Return the error for a cursor that this service did not issue."""
    return InvalidInput(
        "the cursor is not valid for this list: omit it to start from the first page.", "cursor"
    )
