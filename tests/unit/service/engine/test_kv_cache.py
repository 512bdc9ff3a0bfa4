"""The KV cache of a batch: service.engine.kv_cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.kv_cache import MAX_STORAGE_RATIO, MIN_SPARE_COLUMNS, BatchKVCache

torch.set_num_threads(1)

LAYERS, HEADS, SIZE = 2, 3, 4
WIDTHS = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def states(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, HEADS, columns, SIZE)


class CacheHarness:
    """A cache and the expected content of its rows: for each layer, keys and values (2, heads, tokens,
    size)."""

    def __init__(self, widths: list[int]) -> None:
        """Create rows that were prefilled together with padding on the left."""
        self.cache = BatchKVCache()
        wide = max(widths)
        self.rows: list[list[Tensor]] = [[] for _ in widths]
        for layer in range(LAYERS):
            keys, values = states(len(widths), wide), states(len(widths), wide)
            self.cache.update(keys, values, layer)
            for i, width in enumerate(widths):
                self.rows[i].append(torch.stack([keys[i, :, wide - width :], values[i, :, wide - width :]]))

    @property
    def width(self) -> int:
        return max(r[0].shape[2] for r in self.rows)

    def step(self) -> None:
        for layer in range(LAYERS):
            keys, values = states(len(self.rows), 1), states(len(self.rows), 1)
            updated = self.cache.update(keys, values, layer)
            assert updated[0].shape[2] == self.width + (layer == 0) and updated[0].shape == updated[1].shape
            for i, r in enumerate(self.rows):
                r[layer] = torch.cat([r[layer], torch.stack([keys[i], values[i]])], 2)

    def drop(self, dropped: set[int]) -> None:
        row_count = len(self.rows) - len(dropped)
        holes = [i for i in range(row_count) if i in dropped]
        movers = [i for i in range(row_count, len(self.rows)) if i not in dropped]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        self.rows = self.rows[:row_count]
        self.cache.compact(row_count, holes, movers, self.width)

    def merge(self, other: CacheHarness) -> None:
        self.cache.merge(other.cache)
        self.rows += other.rows

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.width
        for number, layer in enumerate(self.cache.layers):
            assert layer.keys is not None and layer.values is not None
            assert layer.keys.shape == (len(self.rows), HEADS, self.width, SIZE)
            assert layer.keys.isfinite().all() and layer.values.isfinite().all()
            for i, r in enumerate(self.rows):
                width = r[number].shape[2]
                assert torch.equal(layer.keys[i, :, self.width - width :], r[number][0])
                assert torch.equal(layer.values[i, :, self.width - width :], r[number][1])
            assert layer._storage is not None
            _, rows, _, columns, _ = layer._storage.shape
            assert rows * columns <= 2 * MAX_STORAGE_RATIO * len(self.rows) * (self.width + MIN_SPARE_COLUMNS)


@settings(max_examples=60, deadline=None)
@given(WIDTHS, st.data())
def test_rows_keep_their_keys_and_values(widths: list[int], data: st.DataObject) -> None:
    """After any merges, removals and steps each row has its keys and values bit for bit, the padding is
    finite, and the size of the storage is bounded."""
    harness = CacheHarness(widths)
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["step", "leave", "join"])):
            case "step":
                for _ in range(data.draw(st.integers(1, 40))):
                    harness.step()
            case "leave":
                dropped = data.draw(
                    st.sets(st.integers(0, len(harness.rows) - 1), max_size=len(harness.rows) - 1)
                )
                harness.drop(dropped)
            case "join":
                other = CacheHarness(data.draw(WIDTHS))
                other.step()
                harness.merge(other)
        harness.check()


def test_non_finite_storage_does_not_leak_into_new_rows() -> None:
    """NaN in the storage of a removed row does not appear in rows that reuse it, shorter or longer."""
    harness = CacheHarness([5, 9])
    for layer in harness.cache.layers:
        assert layer._storage is not None
        layer._storage[:, 1] = float("nan")
    harness.drop({1})
    harness.merge(CacheHarness([2]))
    harness.merge(CacheHarness([30]))
    harness.check()


@pytest.mark.parametrize("steps", [1, 400])
def test_steps_rarely_reallocate(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage is reallocated only a few times for any number of steps."""
    moves = 0
    new_empty = torch.Tensor.new_empty

    def counted(self: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal moves
        moves += 1
        return new_empty(self, *args)

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    harness = CacheHarness([3, 7])
    for _ in range(steps):
        harness.step()
    assert moves <= LAYERS * 9
