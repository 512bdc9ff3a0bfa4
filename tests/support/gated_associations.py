"""Random gated associations of one small layer, and the change that they make by its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.gating.gate_table import GateTable
from service.gating.gated_rows import GatedRows, new_gated_rows
from service.weights.factors import Association, Gate
from service.weights.gate_space import build_gate_space

D, d, LAYER = 24, 6, 2
SPREAD = torch.randn(D, 4 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
STATISTICS = KeyStatistics(LAYER, SPREAD @ SPREAD.T / (4 * D), 1000, 1e-2, "digest")
SPACE = build_gate_space(STATISTICS, size=64)


def gated(
    i: int,
    subject: str | None = None,
    threshold: float = 0.9,
    key: Tensor | None = None,
    others: int = 2,
    blocked: Tensor | None = None,
) -> Association:
    """Return an association with keys around its own."""
    g = torch.Generator().manual_seed(i)
    key = torch.randn(D, generator=g) if key is None else key
    keys = torch.stack([key, *(key + 0.05 * torch.randn(D, generator=g) for _ in range(others))])
    blocked = torch.empty(0, D) if blocked is None else blocked
    gate = Gate(SPACE, SPACE.project(keys), SPACE.project(blocked), threshold)
    direction = STATISTICS.solve(key).float()
    value = torch.randn(d, generator=g)
    return Association(f"edit_{i:03}", subject or f"s{i}", LAYER, key, direction, value, gate=gate)


def some_keys(count: int, seed: int = 100_000) -> Tensor:
    """Return random keys (count, D)."""
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def new_table() -> GateTable:
    return GateTable(SPACE, torch.device("cpu"))


def rows_of(associations: Sequence[Association], table: GateTable | None = None) -> GatedRows:
    """Return the rows of a version, in a table of their own if none is given."""
    table = new_table() if table is None else table
    return new_gated_rows(table, [table.row(a) for a in associations])


def dense_change(rows: GatedRows, keys: Tensor) -> Tensor:
    """Return the change at keys (T, D), (T, d), with zeros where nothing opens."""
    total, change = torch.zeros(len(keys), d), rows.change(keys)
    return total if change is None else total.index_copy(0, change.tokens, change.changes)


def scores_of(associations: Sequence[Association], key: Tensor) -> dict[str, float]:
    """Return the score of each association at a key, in fp64."""
    q = torch.nn.functional.normalize(SPACE.sketch.double() @ key.double(), dim=0)
    scores = {}
    for a in associations:
        assert a.gate is not None
        limit = max([a.gate.threshold, *(float(q @ b.double()) for b in a.gate.blocked)])
        scores[a.edit] = max(float(q @ own.double()) for own in a.gate.keys) - limit
    return scores


def change_by_definition(associations: Sequence[Association], key: Tensor) -> Tensor:
    """Return the change at a key, one association at a time, in fp64."""
    scores = scores_of(associations, key)
    change = torch.zeros(d, dtype=torch.float64)
    nearest = max(sorted(scores), key=lambda edit: scores[edit], default=None)
    if nearest is None or scores[nearest] <= 0:
        return change
    subject = next(a.subject for a in associations if a.edit == nearest)
    for a in associations:
        if a.subject == subject and scores[a.edit] > 0:
            product = a.direction.double() @ key.double()
            ratio = float(product / (a.direction.double() @ a.key.double()))
            change += min(1.0, max(0.0, ratio)) * a.value.double()
    return change
