"""Ids: service.kit.ids."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

from service.kit.ids import created_at, new_id, prefix_of


def test_form() -> None:
    """An id is its prefix and a ULID in Crockford's base 32."""
    assert re.fullmatch(r"edit_[0-7][0-9A-HJKMNP-TV-Z]{25}", new_id("edit"))


def test_ids_grow() -> None:
    """Ids sort in order of creation, also within a millisecond."""
    ids = [new_id("x") for _ in range(2000)]
    assert ids == sorted(set(ids))


def test_threads_never_share_one() -> None:
    """Ids that several threads create at the same time are distinct."""
    with ThreadPoolExecutor(8) as pool:
        made = [x for ids in pool.map(lambda _: [new_id("x") for _ in range(200)], range(8)) for x in ids]
    assert len(set(made)) == 1600


def test_created_at() -> None:
    """`created_at` gives the creation time of an id to the millisecond."""
    before = time.time()
    made = created_at(new_id("call"))
    assert made is not None
    assert int(before * 1000) <= round(made * 1000) <= time.time() * 1000


def test_invalid_id_has_no_creation_time() -> None:
    """Text that is not a valid id has no creation time."""
    assert [created_at(text) for text in ("", "call", "call_1", f"call_{'U' * 26}")] == [None] * 4


def test_prefix_of() -> None:
    """`prefix_of` gives the prefix with which an id was created."""
    assert prefix_of(new_id("edit")) == "edit"
