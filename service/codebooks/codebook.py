"""Codebooks of GRACE: keys, values and radii beside the weights of one layer (Hartvigsen et al. 2023).

For the active entries i of a layer with keys q_i, values v_i, first radii e0_i and labels (the object's tokens), at an
input x of the layer:

    near(x) = argmin_i |x - q_i|                                                 the first one among equals
    out(x)  = v_near      if |x - q_near| <= e_near,      else f(x)
    e_i     = min(e0_i, 1/2 min { |q_i - q_j| : label_j != label_i })

The radii are a function of the set of entries. Balls of different labels do not overlap: e_i + e_j <= |q_i - q_j|.
Entries with `compat` have the radii of the published code instead, which depend on the order of the edits. They are
replayed in the order of their ids, that of the requests, so that they are a function of the set, too. A new entry at
distance d from the nearest row, whose radius is e_near:

    no row, or d > e0 + e_near         a new row with the radius e0
    another label                      a new row with the radius d / 2; e_near becomes d / 2 - 1e-5
    the same label                     no new row; e_near becomes max(e_near, d), and the value that of the new entry

The last value is where the published code continues to train that of the row. Every input is compared: a decision
depends on the text before its position alone, not on where a request ends its prompt, on other rows of a batch, on
padding, or on a cache that is rebuilt. Distances are computed in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.precision import fp64_device
from service.weights.factors import CodebookEntry

ROWS_PER_STEP = 64  # of the distances between all keys
REPLAYED_PER_STEP = 64  # entries
SPLIT_GAP = 1e-5  # what the published code leaves between two balls that it splits


@dataclass(frozen=True)
class Ball:
    """Where an entry acts beside the other active ones; distances in the space of keys."""

    first_radius: float  #: e0
    radius: float | None  #: with the other entries; None if it shares the row of another one (`compat`)
    nearest: float | None  #: distance to the nearest key of another edit; None without one
    nearest_edit: str | None  #: that edit


@dataclass(frozen=True)
class Codebook:
    """The n rows of one layer, as tensors."""

    layer: int
    keys: Tensor = field(repr=False)  #: (n, D) in fp64
    radii: Tensor = field(repr=False)  #: (n,) in fp64
    values: Tensor = field(repr=False)  #: (n, d) in fp32
    edits: tuple[str, ...] = field(repr=False)  #: whose keys these are

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that determines the output, by name."""
        return {"keys": self.keys, "radii": self.radii, "values": self.values}

    def to(self, device: torch.device) -> Codebook:
        """Return the codebook on a device, or on the CPU where the device has no fp64."""
        keys, radii, values = (t.to(fp64_device(device)) for t in self.tensors().values())
        return Codebook(self.layer, keys, radii, values, self.edits)

    def ball_of(self, entry: CodebookEntry) -> Ball:
        """Return where one of the entries acts."""
        row = self.edits.index(entry.edit) if entry.edit in self.edits else None
        radius = None if row is None else float(self.radii[row])
        distances = distances_between(entry.key[None].to(self.keys.device), self.keys, self._squares)[0]
        others = [i for i, edit in enumerate(self.edits) if edit != entry.edit]
        if not others:
            return Ball(entry.radius, radius, None, None)
        nearest = min(others, key=distances.tolist().__getitem__)
        return Ball(entry.radius, radius, float(distances[nearest]), self.edits[nearest])

    @cached_property
    def _squares(self) -> Tensor:
        """|q_i|^2, (n,)."""
        return self.keys.square().sum(1)

    def look_up(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the numbers (m,) of the inputs (T, D) that lie in the ball of their nearest key, and the values (m, d)
        there; None if none does."""
        distances = distances_between(inputs.to(self.keys.device), self.keys, self._squares)
        nearest = distances.argmin(1)
        distance = distances.gather(1, nearest[:, None])[:, 0]
        within = (distance <= self.radii[nearest]).nonzero()[:, 0]
        return (within, self.values[nearest[within]]) if len(within) else None


@dataclass
class _ReplayedRow:
    """A row of the published code while entries are added."""

    entry: CodebookEntry
    radius: float
    value: Tensor


def distances_between(rows: Tensor, keys: Tensor, squares: Tensor | None = None) -> Tensor:
    """Return |x_t - q_i| in fp64, (T, n), of rows (T, D) and keys (n, D); `squares`: |q_i|^2, where they are known."""
    x, q = rows.double(), keys.double()
    squares = q.square().sum(1) if squares is None else squares
    squared = torch.addmm(squares[None], x, q.T, alpha=-2).add_(x.square().sum(1)[:, None])
    return squared.clamp_(min=0).sqrt_()


def order_free_radii(entries: Sequence[CodebookEntry]) -> Stepper[Tensor]:
    """Return the radii (n,) in fp64: those of the entries, at most half of the distance to the nearest key of another
    label."""
    keys = torch.stack([e.key for e in entries]).double()
    squares = keys.square().sum(1)
    number_of_label = {label: i for i, label in enumerate(sorted({e.label for e in entries}))}
    labels = torch.tensor([number_of_label[e.label] for e in entries])
    radii = torch.tensor([e.radius for e in entries], dtype=torch.float64)
    for start in range(0, len(entries), ROWS_PER_STEP):
        at = slice(start, start + ROWS_PER_STEP)
        other = labels[at, None] != labels[None]
        distances = distances_between(keys[at], keys, squares).masked_fill(~other, torch.inf)
        radii[at] = torch.minimum(radii[at], distances.amin(1) / 2)
        yield Progress(Phase.COMPOSE, min(start + ROWS_PER_STEP, len(entries)), len(entries))
    return radii


def _replay(entries: Sequence[CodebookEntry]) -> Stepper[list[_ReplayedRow]]:
    """Return the rows that the published code has after these entries, in their order."""
    keys = torch.stack([e.key for e in entries]).double()
    squares = keys.square().sum(1)
    rows: list[_ReplayedRow] = []
    kept: list[int] = []  # the numbers of the entries whose keys `rows` have
    for start in range(0, len(entries), REPLAYED_PER_STEP):
        batch = entries[start : start + REPLAYED_PER_STEP]
        distances = distances_between(keys[start : start + len(batch)], keys, squares)
        for number, entry in enumerate(batch):
            radius = _add_entry(rows, entry, distances[number, kept])
            if radius is not None:
                kept.append(start + number)
                rows.append(_ReplayedRow(entry, radius, entry.value))
        yield Progress(Phase.COMPOSE, start + len(batch), len(entries))
    return rows


def _add_entry(rows: Sequence[_ReplayedRow], entry: CodebookEntry, distances: Tensor) -> float | None:
    """Change the row nearest to an entry. Return the radius of its own row, or None if it needs none."""
    if not rows:
        return entry.radius
    near = rows[int(distances.argmin())]
    distance = float(distances.min())
    if distance > entry.radius + near.radius:
        return entry.radius
    if near.entry.label != entry.label:
        near.radius = distance / 2 - SPLIT_GAP
        return distance / 2
    near.radius, near.value = max(near.radius, distance), entry.value
    return None


def build_codebook(entries: Sequence[CodebookEntry]) -> Codebook:
    """Run `build_codebook_in_steps` to completion."""
    return run_to_completion(build_codebook_in_steps(entries))


def build_codebook_in_steps(entries: Sequence[CodebookEntry]) -> Stepper[Codebook]:
    """Return the codebook of the active entries of one layer, in the order of their edits' ids, those with replayed
    radii last."""
    ordered = sorted(entries, key=lambda e: (e.replayed, e.edit))
    free = [e for e in ordered if not e.replayed]
    radii = (yield from order_free_radii(free)) if free else torch.empty(0, dtype=torch.float64)
    rows = (yield from _replay(ordered[len(free) :])) if len(free) < len(ordered) else []
    return Codebook(
        ordered[0].layer,
        torch.stack([e.key for e in free] + [r.entry.key for r in rows]).double(),
        torch.cat([radii, torch.tensor([r.radius for r in rows], dtype=torch.float64)]),
        torch.stack([e.value for e in free] + [r.value for r in rows]).float(),
        (*(e.edit for e in free), *(r.entry.edit for r in rows)),
    )
