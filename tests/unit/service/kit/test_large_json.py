"""Large JSON texts, parsed in parts: service.kit.large_json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from service.kit import large_json
from service.kit.large_json import JsonTooLarge, parse_in_parts, parse_json, scan_tokens

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(alphabet='ab",[]{}\\:é\n', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40)
@given(JSON_VALUES, st.sampled_from([None, 1]))
def test_value_is_that_of_the_parser(value: Any, indent: int | None) -> None:
    """Parsing in parts gives the same value as parsing at once."""
    for raw in (json.dumps(value, indent=indent).encode(), json.dumps(value, ensure_ascii=False).encode()):
        assert parse_in_parts(raw) == value


@given(st.text(alphabet='{}[]:,"\\a1 ', max_size=12))
def test_texts_are_valid_as_for_the_parser(text: str) -> None:
    """A text is refused if the parser refuses it, and only then."""
    raw = ('{"a":[' + text + "]}").encode()
    assert outcome(parse_in_parts, raw) == outcome(partial(from_json, allow_inf_nan=False), raw)


def outcome(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    """Return the value of a text, or that it is refused."""
    try:
        return parse(raw)
    except ValueError:
        return "refused"


def test_items_are_parsed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part that is parsed is larger than a group and one item, and a group is many small items."""
    sizes = []

    def record_size(raw: bytes, **options: Any) -> Any:
        sizes.append(len(raw))
        return from_json(raw, **options)

    monkeypatch.setattr(large_json, "from_json", record_size)
    value = {"records": [{"subject": "x" * 200, "n": i} for i in range(10_000)], "seed": 3}
    raw = json.dumps(value).encode()
    assert len(raw) > large_json.MAX_AT_ONCE
    assert parse_json(raw) == value
    assert max(sizes) < large_json.GROUP_SIZE + 1000 and len(sizes) < 100


def test_text_may_be_long_and_escaped() -> None:
    """A text of any length, also of escapes only, is one token."""
    raw = b'"' + b'\\"' * 300_000 + b'"'
    assert list(scan_tokens(raw, 1)) == [(0, len(raw))]
    with pytest.raises(ValueError, match="does not end"):
        list(scan_tokens(raw[:-1], 1))


def test_tokens_are_limited() -> None:
    """More tokens than the limit are refused, also if they are in one list."""
    assert len(list(scan_tokens(b"[0,0]", 5))) == 5
    with pytest.raises(JsonTooLarge, match="more than 4 values"):
        list(scan_tokens(b"[0,0]", 4))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"records":["' + b"x" * 1_100_000 + b'"]}', "an item of `records` has more than 1,000,000 bytes"),
        (b'{"seed":"' + b"x" * 1_100_000 + b'"}', "besides the items of its lists"),
        (b'[["' + b"x" * 1_100_000 + b'"]]', "besides the items of its lists"),
    ],
    ids=["an item", "a member", "no object"],
)
def test_parts_are_limited(raw: bytes, said: str) -> None:
    """A large item, and a large text outside the lists, are refused."""
    with pytest.raises(JsonTooLarge, match=said):
        parse_json(raw)
