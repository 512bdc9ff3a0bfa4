"""The keys of all gated rows of one layer and space that a process holds, side by side for one matrix product.

The versions of a process share the table: a version is a selection of its rows. A row enters when a version needs it
first, and leaves when no version holds it. So a version with one more row, or one fewer, costs that row.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from service.gating.gated_row import GatedRow, new_gated_row
from service.models.precision import fp64_device
from service.weights.factors import Association
from service.weights.gate_space import GateSpace

# The products find rows that come into question, in fp32 and in an order that depends on the batch. The decision is
# that of `gated_row.py`; the margin is far above the error of the products.
MARGIN = 0.01
MIN_SLOTS = 256


class GateTable:
    """The rows of one space, on the device of its layer. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, space: GateSpace, device: torch.device) -> None:
        self.space = space
        self._nbytes = 0
        self._device = device
        self._sketch = space.sketch.to(device).T.contiguous()  # (D, r)
        self._precise_sketch = space.sketch.to(fp64_device(device)).double()
        self._keys = self._sketch.new_empty(MIN_SLOTS, space.sketch.shape[0])
        self._limits = self._sketch.new_empty(MIN_SLOTS)  # of a free slot inf
        self._row_numbers = torch.empty(MIN_SLOTS, dtype=torch.long)  # of a free slot -1
        self._used = self._free = 0  # slots that were given out; those of them that are free again
        self._rows: dict[int, weakref.ref[GatedRow]] = {}
        self._slots: dict[int, slice] = {}
        self._next_number = 0
        self._released: deque[tuple[int, int]] = deque()  # numbers and bytes of rows that no version holds
        self._by_association: dict[int, weakref.ref[GatedRow]] = {}  # by the id of the object, while it lives
        self._by_content: WeakValueDictionary[tuple[str, bytes], GatedRow] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """The memory of the rows that some version holds."""
        self._remove_released()
        return self._nbytes

    # rows

    def row(self, association: Association) -> GatedRow:
        """Return the row of a gated association: the one in the table, or a new one."""
        known = self._by_association.get(id(association))
        row = None if known is None else known()
        if row is None:
            row = self._row_by_content(association)
            if known is None:
                _when_collected(association, self._by_association.pop, id(association), None)
            self._by_association[id(association)] = weakref.ref(row)
        return row

    def _row_by_content(self, association: Association) -> GatedRow:
        """Return the row with the content of an association, whose factors may have been read again."""
        new = new_gated_row(association)
        if new.gate.space.digest != self.space.digest:
            raise ValueError("gated rows need associations whose gates are in one space")
        row = self._by_content.get((new.edit, new.digest))
        if row is None:
            self._by_content[new.edit, new.digest] = row = new
            self._add(new)
        return row

    def _add(self, row: GatedRow) -> None:
        count = len(row.gate.keys)
        self._remove_released()
        if self._used + count > len(self._keys):
            self._reallocate(count)
        slots = slice(self._used, self._used + count)
        self._keys[slots] = row.gate.keys.to(self._device)
        self._limits[slots] = row.gate.threshold - MARGIN
        self._row_numbers[slots] = self._next_number
        self._rows[self._next_number], self._slots[self._next_number] = weakref.ref(row), slots
        _when_collected(row, self._released.append, (self._next_number, row.nbytes))
        self._next_number += 1
        self._used = slots.stop
        self._nbytes += row.nbytes

    def _remove_released(self) -> None:
        while self._released:
            number, nbytes = self._released.popleft()
            slots = self._slots.pop(number)
            del self._rows[number]
            self._limits[slots], self._row_numbers[slots] = torch.inf, -1
            self._free += slots.stop - slots.start
            self._nbytes -= nbytes
        if self._free > max(MIN_SLOTS, self._used // 2):
            self._reallocate(0)

    def _reallocate(self, count: int) -> None:
        """Move the rows to storage in which at least as many slots are unused as used; that of a row is amortized."""
        kept = (self._row_numbers[: self._used] >= 0).nonzero()[:, 0]
        size = max(MIN_SLOTS, 2 * (len(kept) + count))
        keys, limits, numbers = self._keys, self._limits, self._row_numbers
        self._keys, self._limits = keys.new_empty(size, keys.shape[1]), limits.new_empty(size)
        self._row_numbers = numbers.new_empty(size)
        self._keys[: len(kept)] = keys[kept.to(self._device)]
        self._limits[: len(kept)] = limits[kept.to(self._device)]
        self._row_numbers[: len(kept)] = numbers[kept]
        begin = 0
        for number in sorted(self._slots, key=lambda number: self._slots[number].start):
            stop = begin + self._slots[number].stop - self._slots[number].start
            self._slots[number], begin = slice(begin, stop), stop
        self._used, self._free = len(kept), 0

    # look-ups

    @property
    def slots(self) -> int:
        """The number of products at one key."""
        return self._used

    def project(self, keys: Tensor) -> Tensor:
        """Return q(k) of keys (T, D), (T, r) in fp32 on the device."""
        projected: Tensor = torch.nn.functional.normalize(keys.float() @ self._sketch, dim=-1)
        return projected

    def project_precisely(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return a key (D,) and its q(k) (r,), in fp64 in host memory. The product is that of one vector, so that it
        cannot depend on other keys."""
        precise = key.to(self._precise_sketch.device).double().clone()
        q = torch.nn.functional.normalize(self._precise_sketch.mv(precise), dim=0)
        return precise.cpu(), q.cpu()

    def near_rows(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the pairs of a key and a row that may be open: the positions in q (T, r) and the numbers of the rows,
        both in host memory; None if there is none. A pair may come several times."""
        self._remove_released()
        near = q @ self._keys[: self._used].T > self._limits[: self._used]
        if not near.any():
            return None
        tokens, slots = near.nonzero(as_tuple=True)
        return tokens.cpu(), self._row_numbers[slots.cpu()]

    def numbered(self, number: int) -> GatedRow | None:
        """Return the row with a number; None if no version holds it any more."""
        return self._rows[number]()


def _when_collected(thing: object, function: Callable[..., object], *arguments: object) -> None:
    """Call a function when an object is collected. That may be in any thread and at any point, so that the function
    should do no more than note it."""
    weakref.finalize(thing, function, *arguments).atexit = False
