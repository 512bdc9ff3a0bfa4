"""The keys and values of a batch, in storage that is written in place.

All rows end at the same column. The columns left of a row's first token are masked and always finite. A step writes one
column. The last row overwrites a row that leaves; a new row is written after the last. Neither moves other rows. When
the columns are used up, or most of the storage is unused, the used part is copied to storage of the right size; that is
rare enough that the amortized cost of a token does not depend on the length of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MIN_SPARE_COLUMNS = 32  # least free columns of new storage
MAX_STORAGE_RATIO = 4  # most storage, as a multiple of the used part


class BatchKVLayer(DynamicLayer):  # type: ignore[misc]
    """One layer. `keys` and `values` (rows, heads, columns, size) are the views of the storage that attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self._storage: Tensor | None = None  # (2, rows, heads, columns, size)
        self._rows = self._begin = self._end = 0

    @property
    def width(self) -> int:
        return self._end - self._begin

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new columns after the last, and return all keys and all values."""
        self._rows, count = key_states.shape[0], key_states.shape[2]
        end = self._end + count
        if self._storage is None or end > self._storage.shape[3]:
            self._reallocate(self._rows, self.width, self.width + count, key_states)
            end = self._end + count
        assert self._storage is not None
        self._storage[0, : self._rows, :, self._end : end] = key_states
        self._storage[1, : self._rows, :, self._end : end] = value_states
        self._end = end
        self._update_views()
        return self.keys, self.values

    def compact(self, row_count: int, holes: Sequence[int], movers: Sequence[int], width: int) -> None:
        """Keep `row_count` rows with their last `width` columns; the rows at `movers` replace those at `holes`."""
        assert self._storage is not None
        for hole, mover in zip(holes, movers, strict=True):
            self._storage[:, hole, :, : self._end] = self._storage[:, mover, :, : self._end]
        self._rows, self._begin = row_count, self._end - width
        _, rows, _, columns, _ = self._storage.shape
        if rows * columns > MAX_STORAGE_RATIO * row_count * (width + MIN_SPARE_COLUMNS):
            self._reallocate(row_count, width, width)
        self._update_views()

    def merge(self, other: BatchKVLayer) -> None:
        """Append the rows of another layer."""
        assert self._storage is not None and other._storage is not None
        rows, width = self._rows + other._rows, max(self.width, other.width)
        if rows > self._storage.shape[1] or width > self._end:
            self._reallocate(rows, width, width)
        offset, self._begin = self._end - other.width, self._end - width
        theirs = other._storage[:, : other._rows, :, other._begin : other._end]
        self._storage[:, self._rows : rows, :, :offset] = 0
        self._storage[:, self._rows : rows, :, offset : self._end] = theirs
        self._rows = rows
        self._update_views()

    def _reallocate(self, rows: int, end: int, columns: int, like: Tensor | None = None) -> None:
        """Allocate storage for `rows` rows and more than `columns` columns. The used part then ends at column `end`."""
        old, begin = self._storage, end - self.width
        like = like if old is None else old
        assert like is not None
        shape = (2, rows, like.shape[-3], columns + max(MIN_SPARE_COLUMNS, columns // 2), like.shape[-1])
        self._storage = like.new_empty(shape)
        if old is not None:
            copied_rows = min(self._rows, rows)
            self._storage[:, :copied_rows, :, :begin] = 0
            self._storage[:, :copied_rows, :, begin:end] = old[:, :copied_rows, :, self._begin : self._end]
        self._begin, self._end = begin, end

    def _update_views(self) -> None:
        assert self._storage is not None
        self.keys, self.values = self._storage[:, : self._rows, :, self._begin : self._end]
        self.is_initialized = True


class BatchKVCache(Cache):  # type: ignore[misc]
    """The cache of a batch, as transformers' models use it. It holds all tokens of each sequence but the last."""

    layers: list[BatchKVLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BatchKVLayer)

    def compact(self, row_count: int, holes: Sequence[int], movers: Sequence[int], width: int) -> None:
        """Keep `row_count` rows; the rows at `movers` replace those at `holes`."""
        for layer in self.layers:
            layer.compact(row_count, holes, movers, width)

    def merge(self, other: BatchKVCache) -> None:
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.merge(theirs)
