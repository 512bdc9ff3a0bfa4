"""A queue that is fair between callers: start-time fair queueing (Goyal, Vin and Chen, SIGCOMM 1996).

Each item has a position S = max(V, F). V is the position of the item that was removed last. F = S' + c' is the end of
the item that the caller added before, with position S' and cost c'. The item with the least position is removed first.
The cost is the service that an item needs, divided by the weight of its caller. So callers that always have waiting
items are served in proportion to their weights, whatever they add. An item of a caller that has none waiting comes
before the second item of every other caller.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class QueuedItem(Generic[Item]):
    """An item and its place."""

    item: Item
    caller: str
    position: float
    number: int  #: of its arrival; orders the items of one position


class FairQueue(Generic[Key, Item]):
    """Waiting items by key. An operation takes time in proportion to their number."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []  # the position and the number of each item
        self._keys: dict[int, Key] = {}  # by number
        self._items: dict[Key, QueuedItem[Item]] = {}
        self._ends: dict[str, float] = {}  # caller -> the end of its newest item
        self._virtual_time = 0.0
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Key) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[tuple[Key, QueuedItem[Item]]]:
        """Yield the keys and items, the one that is due first first."""
        for _, number in self._order:
            yield (key := self._keys[number]), self._items[key]

    def count_of(self, caller: str) -> int:
        """Return the number of items of a caller."""
        return sum(queued.caller == caller for queued in self._items.values())

    def add(self, key: Key, item: Item, caller: str, cost: float) -> None:
        """Add an item. Has no effect while an item with this key waits."""
        if key not in self._items:
            position = max(self._virtual_time, self._ends.get(caller, 0.0))
            self._ends[caller] = position + cost
            self._insert(key, item, caller, position)

    def put_back(self, key: Key, item: Item, caller: str, position: float) -> None:
        """Add an item that was removed, in its old place. Has no effect while an item with this key waits."""
        if key not in self._items:
            self._insert(key, item, caller, min(position, self._virtual_time))

    def first(self, excluded: Collection[str] = (), only: str | None = None) -> Key | None:
        """Return the key of the item that is due first, of no excluded caller, and of the caller `only` if given."""
        for key, queued in self:
            if queued.caller not in excluded and only in (None, queued.caller):
                return key
        return None

    def remove(self, key: Key) -> QueuedItem[Item]:
        """Remove an item that is served, and return it."""
        queued = self._items.pop(key)
        del self._order[bisect_left(self._order, (queued.position, queued.number))]
        del self._keys[queued.number]
        self._virtual_time = max(self._virtual_time, queued.position)
        if not self._items:
            self._ends, self._virtual_time = {}, 0.0
        return queued

    def _insert(self, key: Key, item: Item, caller: str, position: float) -> None:
        queued = self._items[key] = QueuedItem(item, caller, position, next(self._numbers))
        self._keys[queued.number] = key
        insort(self._order, (position, queued.number))
