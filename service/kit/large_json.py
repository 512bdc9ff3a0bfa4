"""Large JSON texts as values, parsed in parts so that no part holds the interpreter's lock for long.

The parser of pydantic holds the lock for the whole text, and one byte of text can become 24 bytes of values. So a large
text is first scanned: the number of its tokens is limited, and the items of its lists are parsed in groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

MAX_AT_ONCE = 1_000_000  #: bytes that are parsed at once, and bytes of one item of a list in a large text
GROUP_SIZE = 65_536  #: bytes of items that are parsed together
MAX_TOKENS = 1_000_000  #: texts, numbers and punctuation marks of a large text

# One match holds the interpreter's lock: its repetitions are limited.
_TOKEN = re.compile(rb'"(?:[^"\\]{1,4096}+|\\.){0,256}+"|[][{},:]|[^][{},:"]{1,65536}+', re.DOTALL)
_PART_OF_TEXT = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){0,256}+', re.DOTALL)
_QUOTE, _OPEN_LIST, _COMMA = b'"[,'


class JsonTooLarge(ValueError):
    """A text, or a part of it, exceeds a limit of this module."""


def parse_json(raw: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError also for NaN, Infinity and lone surrogates, which the parser
    of the standard library accepts, and JsonTooLarge."""
    return _parse(raw) if len(raw) <= MAX_AT_ONCE else parse_in_parts(raw)


def scan_tokens(raw: bytes, limit: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each token: a text, a punctuation mark, or what is between them.

    Raises JsonTooLarge when there are more than `limit`, and ValueError for a text that does not end.
    """
    position = count = 0
    while position < len(raw):
        if count == limit:
            raise JsonTooLarge(f"it has more than {limit:,} values and punctuation marks")
        token = _TOKEN.match(raw, position)
        end = _end_of_text(raw, position) if token is None else token.end()
        yield position, end
        position, count = end, count + 1


def _end_of_text(raw: bytes, start: int) -> int:
    """Return the end of a long text, which starts with a quotation mark."""
    position = start + 1
    while (part := _PART_OF_TEXT.match(raw, position)) and part.end() > position:
        position = part.end()
    if raw[position : position + 1] != b'"':
        raise ValueError("a text does not end")
    return position + 1


def _parse(raw: bytes) -> Any:
    value = from_json(raw, allow_inf_nan=False)
    json.dumps(value, allow_nan=False)  # 1e999 is valid JSON and becomes infinity
    return value


@dataclass
class _List:
    """A list that is a member of the object, while it is scanned."""

    name: str
    group_start: int  #: of the items that are not parsed yet
    item_start: int
    items: list[Any] = field(default_factory=list)

    def end_item(self, raw: bytes, end: int, is_last: bool) -> None:
        """Check the size of an item, and parse the items of the group if it is large enough or the last one."""
        if end - self.item_start > MAX_AT_ONCE:
            raise JsonTooLarge(f"an item of `{self.name}` has more than {MAX_AT_ONCE:,} bytes")
        if is_last or end - self.group_start >= GROUP_SIZE:
            self._parse_group(raw[self.group_start : end], is_last)
            self.group_start = end + 1
        self.item_start = end + 1

    def _parse_group(self, group: bytes, is_last: bool) -> None:
        if is_last and not self.items and not group.strip():
            return  # an empty list
        try:
            items = _parse(b"[" + group + b"]")
        except ValueError as error:
            raise ValueError(f"`{self.name}` from item {len(self.items)} on: {error}") from None
        if not items:  # two commas in a row, or one before the end
            raise ValueError(f"`{self.name}`: item {len(self.items)} is missing")
        self.items += items


def parse_in_parts(raw: bytes) -> Any:
    """Return the value of a large object. The items of the lists among its members are parsed in groups."""
    frame, lists = [], []  # the text without these items, and the lists
    depth = frame_start = 0
    key, current = b"", None
    is_object = raw[:GROUP_SIZE].lstrip().startswith(b"{")
    for start, end in scan_tokens(raw, MAX_TOKENS):
        first = raw[start]
        if first in b"[{":
            depth += 1
            if first == _OPEN_LIST and depth == 2 and is_object:
                current = _List(_key_name(key), end, end)
                frame.append(raw[frame_start:end])
        elif first in b"]}":
            depth -= 1
            if current is not None and depth == 1:
                current.end_item(raw, start, is_last=True)
                lists.append(current)
                current, frame_start = None, start
        elif current is None and depth == 1 and first == _QUOTE:
            key = raw[start:end]
        elif current is not None and depth == 2 and first == _COMMA:
            current.end_item(raw, start, is_last=False)
    frame.append(raw[frame_start:] if current is None else b"")
    return _fill(b"".join(frame), lists)


def _key_name(key: bytes) -> str:
    return str(_parse(key)) if 0 < len(key) <= 1000 else ""


def _fill(frame: bytes, lists: list[_List]) -> Any:
    """Return the object whose text without the items of its lists is `frame`."""
    if len(frame) > MAX_AT_ONCE:
        raise JsonTooLarge(f"it has more than {MAX_AT_ONCE:,} bytes besides the items of its lists")
    value = _parse(frame)
    if isinstance(value, dict):
        for one in lists:
            if isinstance(value.get(one.name), list):
                value[one.name] = one.items
    return value
