"""Ids."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from service.ids import new_id


def test_form():
    """An id is its prefix and a ULID in Crockford's digits."""
    assert re.fullmatch(r"edit_[0-7][0-9A-HJKMNP-TV-Z]{25}", new_id("edit"))


def test_ids_grow():
    """Ids sort in the order in which they were made, also within a millisecond."""
    ids = [new_id("x") for _ in range(2000)]
    assert ids == sorted(set(ids))


def test_threads_never_share_one():
    """Threads that make ids at once make different ones."""
    with ThreadPoolExecutor(8) as pool:
        made = [x for ids in pool.map(lambda _: [new_id("x") for _ in range(200)], range(8)) for x in ids]
    assert len(set(made)) == 1600
