"""How much of a layer is already spoken for.

The keys k_i of a layer's active associations, with directions u_i = C^-1 k_i, span a space in which a new change cannot be chosen
freely. Of a new key k the share that lies in it is that of its projection, orthogonal in the metric C^-1:

    spoken = g^T G^-1 g / (k^T C^-1 k)        g_i = u_i^T k        G_ij = k_i^T C^-1 k_j, plus a ridge        room = 1 - spoken

For keys drawn from the statistics, E[k k^T] = C, so that E[g g^T] = G and E[k^T C^-1 k] = D, the width: on average
tr(G (G + ridge)^-1) / D is spoken for, the number of keys that are really different over the number that there could be.

Keys are compared within one metric: AlphaEdit's directions are P k, those of all other forms C^-1 k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper
from service.weights.composition import gram_matrix
from service.weights.factors import DEFAULT_RIDGE, Association, EditUpdate


def remaining_capacity(gram: Tensor, overlap: Tensor, own: float, ridge: float = DEFAULT_RIDGE) -> float:
    """What is left of a key: gram (n, n) of the keys that are there, their overlap (n,) with it, and its own u^T k.

    `ridge` is a multiple of the gram matrix's mean diagonal entry.
    """
    if not len(overlap):
        return 1.0
    occupied = float(overlap @ torch.linalg.solve(_with_ridge(gram, ridge), overlap)) / own
    return min(1.0, max(0.0, 1 - occupied))


def average_capacity(gram: Tensor, width: int, ridge: float = DEFAULT_RIDGE) -> float:
    """What is left of a key drawn from the statistics, on average; keys are `width` long."""
    occupied = float(torch.linalg.solve(_with_ridge(gram, ridge), gram).trace()) / width
    return min(1.0, max(0.0, 1 - occupied))


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def measure_capacities(
    edits: Sequence[Sequence[EditUpdate]], others: Iterable[EditUpdate]
) -> Stepper[list[dict[int, float]]]:
    """Of each new edit, by layer, what active pieces leave of its key. Those of its own subject are left out: they share its key, and
    are meant to. A change of a whole weight has no key."""
    active_by_metric = _group_by_metric(others)
    occupied = {place: _OccupiedKeys(known) for place, known in active_by_metric.items()}
    capacities: list[dict[int, float]] = []
    for edit in edits:
        new_associations = _group_by_metric(edit).items()
        capacities.append(
            {
                new.layer: occupied[x].remaining_capacity(new) if x in occupied else 1.0
                for x, (new,) in new_associations
            }
        )
        yield Progress(Phase.CAPACITY, len(capacities), len(edits))
    return capacities


class _OccupiedKeys:
    """The keys of some associations of one layer and metric, and their gram matrix, for several new edits."""

    def __init__(self, associations: Sequence[Association]) -> None:
        self.associations, self.directions = associations, torch.stack([a.direction for a in associations])
        self.gram = gram_matrix(associations, self.directions)

    def remaining_capacity(self, new: Association) -> float:
        """What is left of a new key by those of other subjects."""
        rows = [i for i, a in enumerate(self.associations) if a.subject != new.subject]
        own = float(new.key.double() @ new.direction.double())
        return remaining_capacity(self.gram[rows][:, rows], gram_matrix([new], self.directions)[0, rows], own)


def average_capacities(updates: Iterable[EditUpdate]) -> dict[int, float]:
    """By layer, what pieces leave of an average key; where two metrics are in use, the less."""
    capacities: dict[int, float] = {}
    for (layer, _), associations in _group_by_metric(updates).items():
        gram = gram_matrix(associations, torch.stack([a.direction for a in associations]))
        capacities[layer] = min(average_capacity(gram, len(associations[0].key)), capacities.get(layer, 1.0))
    return capacities


def _group_by_metric(updates: Iterable[EditUpdate]) -> dict[tuple[int, str], list[Association]]:
    """The associations of one layer and one metric."""
    groups: dict[tuple[int, str], list[Association]] = {}
    for p in updates:
        if isinstance(p, Association):
            groups.setdefault((p.layer, p.solve_mode.rule.metric), []).append(p)
    return groups
