"""The share of a layer's keys that active edits have not yet occupied.

The keys k_i of a layer's active associations, with directions u_i = C^-1 k_i, span a subspace in which a new change
cannot be chosen freely. The occupied share of a new key k is that of its projection onto it, orthogonal in the metric
C^-1:

    occupied = g^T G^-1 g / (k^T C^-1 k)      g_i = u_i^T k      G_ij = k_i^T C^-1 k_j, plus a ridge
    capacity = 1 - occupied

For keys drawn from the statistics, E[k k^T] = C, so that E[g g^T] = G and E[k^T C^-1 k] = D, the width: on average
tr(G (G + ridge)^-1) / D is occupied, the number of distinct keys over the number of possible ones.

Keys are compared within one metric: the directions of AlphaEdit are P k, those of all other methods C^-1 k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.weights.composition import gram_matrix, gram_matrix_in_steps
from service.weights.factors import DEFAULT_RIDGE, Association, EditUpdate
from service.weights.solve import SOLVE_COLUMNS, AnyRankFactors, factorize_any_rank, solve_any_rank


def remaining_capacity(gram: Tensor, overlap: Tensor, own: float, ridge: float = DEFAULT_RIDGE) -> float:
    """Run `_occupied_share` to completion and return the capacity: gram (n, n) of the active keys, their overlap (n,)
    with the new key, and its own u^T k. `ridge` is a multiple of the gram matrix's mean diagonal entry."""
    if not len(overlap):
        return 1.0
    factors = run_to_completion(factorize_any_rank(_with_ridge(gram, ridge)))
    return run_to_completion(_remaining(factors, overlap, own))


def _remaining(factors: AnyRankFactors, overlap: Tensor, own: float) -> Stepper[float]:
    """Return the capacity of a key from the factors of the gram matrix with its ridge; 1 for a key without a
    direction."""
    solution = yield from solve_any_rank(factors, overlap[:, None])
    occupied = float(overlap @ solution[:, 0]) / own if own else 0.0
    return min(1.0, max(0.0, 1 - occupied))


def average_capacity(gram: Tensor, width: int, ridge: float = DEFAULT_RIDGE) -> float:
    """Run `average_capacity_in_steps` to completion."""
    return run_to_completion(average_capacity_in_steps(gram, width, ridge))


def average_capacity_in_steps(gram: Tensor, width: int, ridge: float = DEFAULT_RIDGE) -> Stepper[float]:
    """Return the mean capacity of a key of `width` entries drawn from the statistics."""
    factors = yield from factorize_any_rank(_with_ridge(gram, ridge))
    diagonal: list[float] = []
    for start in range(0, len(gram), SOLVE_COLUMNS):
        part = yield from solve_any_rank(factors, gram[:, start : start + SOLVE_COLUMNS])
        diagonal += part[start:].diagonal().tolist()
    occupied = sum(diagonal) / width
    return min(1.0, max(0.0, 1 - occupied))


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:
    raised = gram.clone()
    raised.diagonal().add_(ridge * gram.diagonal().mean())
    return raised


def measure_capacities(
    edits: Sequence[Sequence[EditUpdate]], others: Iterable[EditUpdate]
) -> Stepper[list[dict[int, float]]]:
    """Return the capacity that the active updates leave of each new edit's key, by layer; the least of several keys.

    Active edits of the same subject are left out: they share the key on purpose. A dense update has no key.
    """
    occupied: dict[tuple[int, str], _OccupiedKeys] = {}
    for place, associations in _group_by_metric(others).items():
        directions = torch.stack([a.direction for a in associations])
        gram = yield from gram_matrix_in_steps(associations, directions)
        occupied[place] = _OccupiedKeys(associations, directions, gram)
    capacities: list[dict[int, float]] = []
    for edit in edits:
        by_layer: dict[int, float] = {}
        for place, new_associations in _group_by_metric(edit).items():
            least = 1.0
            for new in new_associations if place in occupied else ():
                least = min(least, (yield from occupied[place].remaining(new)))
            by_layer[place[0]] = least
        capacities.append(by_layer)
        yield Progress(Phase.CAPACITY, len(capacities), len(edits))
    return capacities


class _OccupiedKeys:
    """The keys of the associations of one layer and metric, and their gram matrix, for several new edits."""

    def __init__(self, associations: Sequence[Association], directions: Tensor, gram: Tensor) -> None:
        self._associations, self._directions, self._gram = associations, directions, gram
        self._factors: tuple[list[int], AnyRankFactors] | None = None  # of the rows that were used last

    def remaining(self, new: Association) -> Stepper[float]:
        """Return the capacity that the keys of other subjects leave of a new key."""
        rows = [i for i, a in enumerate(self._associations) if a.subject != new.subject]
        if not rows:
            return 1.0
        if self._factors is None or self._factors[0] != rows:
            gram = self._gram if len(rows) == len(self._gram) else self._gram[rows][:, rows]
            factors = yield from factorize_any_rank(_with_ridge(gram, DEFAULT_RIDGE))
            self._factors = rows, factors
        overlap = gram_matrix([new], self._directions)[0, rows]
        own = float(new.key.double() @ new.direction.double())
        return (yield from _remaining(self._factors[1], overlap, own))


def average_capacities(updates: Iterable[EditUpdate]) -> dict[int, float]:
    """Run `average_capacities_in_steps` to completion."""
    return run_to_completion(average_capacities_in_steps(updates))


def average_capacities_in_steps(updates: Iterable[EditUpdate]) -> Stepper[dict[int, float]]:
    """Return the mean capacity of each edited layer; the smaller where two metrics are in use."""
    capacities: dict[int, float] = {}
    for (layer, _), associations in _group_by_metric(updates).items():
        gram = yield from gram_matrix_in_steps(associations, torch.stack([a.direction for a in associations]))
        capacity = yield from average_capacity_in_steps(gram, len(associations[0].key))
        capacities[layer] = min(capacity, capacities.get(layer, 1.0))
    return capacities


def _group_by_metric(updates: Iterable[EditUpdate]) -> dict[tuple[int, str], list[Association]]:
    """Return the associations of each layer and metric. A gated one, or one that is not solved, occupies nothing and
    needs no room."""
    groups: dict[tuple[int, str], list[Association]] = {}
    for p in updates:
        if isinstance(p, Association) and p.gate is None and p.solve_mode.rule.solved:
            groups.setdefault((p.layer, p.solve_mode.rule.metric), []).append(p)
    return groups
