"""One gated association at one key: whether it opens, and what it adds.

These are the decisions of `gated_rows.py`, which finds the few rows that come into question at a key. Everything here
is computed for one key and one row at a time, so that no other token and no other row can change a decision. The
precision is fp64, and cosines are fixed-point numbers with 50 fractional bits: their sums are exact in any order, so
that two equal keys have one cosine on every machine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from service.weights.factors import Association, Gate

UNIT = 2.0**50  # of fixed-point cosines


def fixed_point_cosines(q: Tensor, keys: Tensor) -> Tensor:
    """Return the products of q (r,) in fp64 with keys (m, r) in fp32, all of norm 1, in multiples of 1 / UNIT: (m,) in
    int64. A product of two entries is rounded; the sum is exact."""
    return (keys.double() * q).mul_(UNIT).round_().long().sum(1)


@dataclass(frozen=True, eq=False)
class GatedRow:
    """A gated association in host memory. It shares the tensors of the association."""

    association: Association = field(repr=False)
    gate: Gate = field(repr=False)
    direction: Tensor = field(repr=False)  #: w (D,) in fp32
    value: Tensor = field(repr=False)  #: delta (d,) in fp32

    @property
    def edit(self) -> str:
        return self.association.edit

    @property
    def subject(self) -> str:
        return self.association.subject

    @cached_property
    def nbytes(self) -> int:
        """The memory of the row with its association."""
        tensors = (self.association.key, self.association.direction, *self.tensors())
        return sum(t.nbytes for t in tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that determine the change."""
        return self.gate.keys, self.gate.blocked, self.direction, self.value

    @cached_property
    def digest(self) -> bytes:
        """The sha256 of everything that determines the change, without the id of the edit."""
        digest = hashlib.sha256(f"{self.subject}:{[tuple(t.shape) for t in self.tensors()]}:".encode())
        digest.update(struct.pack("<d", self.gate.threshold))
        for tensor in self.tensors():
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    def score(self, q: Tensor) -> int:
        """Return score(k) for q(k) (r,) in fp64, as a fixed-point number."""
        limit = round(self.gate.threshold * UNIT)
        if len(self.gate.blocked):
            limit = max(limit, int(fixed_point_cosines(q, self.gate.blocked).max()))
        return int(fixed_point_cosines(q, self.gate.keys).max()) - limit

    def response(self, key: Tensor) -> float:
        """Return g(k) at a key (D,) in fp64."""
        return min(1.0, max(0.0, float(self.direction.double() @ key)))


def new_gated_row(association: Association) -> GatedRow:
    """Return the row of a gated association."""
    if association.gate is None:
        raise ValueError("a gated row needs an association with a gate")
    gate, value = association.gate, association.value.float().cpu()
    return GatedRow(association, gate, association.response_direction().cpu(), value)


def change_at(key: Tensor, q: Tensor, rows: Sequence[GatedRow]) -> Tensor | None:
    """Return the change of the output at a key (D,), (d,) in fp64; None if nothing opens.

    q(k) (r,) and k are in fp64. The rows are in the order of their edits' ids, which is that of the sum, too.
    """
    opened = open_rows(q, rows)
    if not opened:
        return None
    total = torch.zeros(len(rows[0].value), dtype=torch.float64)
    for row in opened:
        total += row.response(key) * row.value.double()
    return total


def open_rows(q: Tensor, rows: Sequence[GatedRow]) -> list[GatedRow]:
    """Return the rows that act at q(k) (r,) in fp64: those of the nearest subject whose score is above 0."""
    scores = [row.score(q) for row in rows]
    best = max(scores, default=0)
    if best <= 0:
        return []
    subject = rows[scores.index(best)].subject
    return [row for row, score in zip(rows, scores, strict=True) if score > 0 and row.subject == subject]
