"""The change that one edit adds to a set of other edits, without composing a version for each edit.

For the associations of one layer and one solve mode let H = U^T K + ridge I be the system of the other edits, with
entries H_rc = k_r^T u_c, and X its solution for their targets (`service/weights/composition.py`). An edit with key k,
direction u and change of value delta borders the system:

    [ H    b ] [ X' ]   [ T + g delta^T ]        b_r = k_r^T u        g_r = b_r / k^T u for the edit's subject, else 0
    [ c^T  h ] [ x  ] = [ t             ]        c_r = k^T u_r        h = k^T u + ridge

With z = H^-1 b and y = H^-1 g, block elimination gives x = (t - X^T c - (c^T y) delta) / (h - c^T z), and the change of
the weight is of rank two at most:

    X'^T U^T + x u^T - X^T U^T = delta (U y)^T + x (u - U z)^T

g and y are zero in the modes that do not superpose the edits of a subject. H has the ridge of the version
that contains all new edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import WeightRef
from service.weights.composition import gram_matrix, gram_matrix_in_steps, superpose_by_subject
from service.weights.factors import Association, DenseUpdate, EditUpdate, LowRank, SolveMode
from service.weights.solve import AnyRankFactors, factorize_any_rank, solve_any_rank


@dataclass(frozen=True)
class _System:
    """The other associations of one layer and mode, and their system."""

    associations: list[Association]
    directions: Tensor  #: (n, D)
    diagonal: Tensor  #: (n,), k_r^T u_r
    solution: Tensor  #: X (n, d)
    factors: AnyRankFactors
    ridge: float


@dataclass(frozen=True)
class _Bordering:
    """What a new association adds to a system, apart from the size of its change of value."""

    same_subject: Tensor  #: (d,): what the other associations of the subject add to the target at the new key
    overlap: Tensor  #: X^T c (d,)
    own: float  #: k^T u
    ridge: float
    pivot: float  #: h - c^T z
    exchange: float  #: c^T y
    shared: Tensor  #: U y (D,)
    remainder: Tensor  #: u - U z (D,)


class OwnChanges:
    """The changes that new edits add to the same other edits. `build` factorizes the systems once."""

    def __init__(self, borderings: dict[tuple[str, WeightRef], _Bordering]) -> None:
        self._borderings = borderings

    @classmethod
    def build(
        cls, edits: Sequence[Sequence[EditUpdate]], others: Sequence[EditUpdate]
    ) -> Stepper[OwnChanges]:
        """Prepare the changes of new edits, each alone next to `others`."""
        new_by_place = _by_place([update for edit in edits for update in edit])
        others_by_place = _by_place(others)
        borderings: dict[tuple[str, WeightRef], _Bordering] = {}
        for place, new in new_by_place.items():
            system = yield from _build_system(place[1], others_by_place.get(place, []), new)
            for association in new:
                bordering = yield from _border(system, association, place[1])
                borderings[association.edit, association.weight_ref] = bordering
        return cls(borderings)

    def norm(self, update: EditUpdate) -> float:
        """Return the Frobenius norm of the change of the weight that an update adds, at the strength that the update
        has; 0 for one that is looked up."""
        if isinstance(update, DenseUpdate):
            return float(update.change.double().norm())
        if isinstance(update, Association) and update.gate is None:
            return self.change(update).norm()
        return 0.0

    def change(self, update: Association) -> LowRank:
        """Return the change that an association adds."""
        b, delta = self._borderings[update.edit, update.weight_ref], update.value.double()
        target = delta
        if update.solve_mode.rule.superposes_subjects:
            target = delta * (b.own + b.ridge) / b.own + b.same_subject
        x = (target - b.overlap - b.exchange * delta) / b.pivot
        return LowRank(torch.stack([delta, x], 1), torch.stack([b.shared, b.remainder]))


def _by_place(updates: Sequence[EditUpdate]) -> dict[tuple[WeightRef, SolveMode], list[Association]]:
    """Return the associations of each weight and solve mode, in the order of the edits' ids."""
    places: dict[tuple[WeightRef, SolveMode], list[Association]] = {}
    for update in sorted(updates, key=lambda u: u.edit):
        if isinstance(update, Association) and update.gate is None:
            places.setdefault((update.weight_ref, update.solve_mode), []).append(update)
    return places


def _own_product(a: Association) -> float:
    return float(a.key.double() @ a.direction.double())


def _build_system(
    mode: SolveMode, others: list[Association], new: Sequence[Association]
) -> Stepper[_System | None]:
    """Factorize the system of the other associations, or return None when there are none."""
    if not others:
        return None
    directions = torch.stack([a.direction for a in others])
    gram = yield from gram_matrix_in_steps(others, directions)
    diagonal = gram.diagonal().clone()
    new_diagonal = torch.tensor([_own_product(a) for a in new], dtype=torch.float64)
    ridge = mode.ridge_for(torch.cat([diagonal, new_diagonal]))
    gram.diagonal().add_(ridge)
    values = torch.stack([a.value for a in others], 1).double()
    targets = values
    if mode.rule.superposes_subjects:
        targets = yield from superpose_by_subject(others, values, gram, diagonal)
    factors = yield from factorize_any_rank(gram)
    solution = yield from solve_any_rank(factors, targets.T)
    return _System(others, directions, diagonal, solution, factors, ridge)


def _border(system: _System | None, new: Association, mode: SolveMode) -> Stepper[_Bordering]:
    """Return the bordering of a new association."""
    own, direction = _own_product(new), new.direction.double()
    if system is None:
        ridge = mode.ridge_for(torch.tensor([own], dtype=torch.float64))
        zero = torch.zeros(len(new.value), dtype=torch.float64)
        return _Bordering(zero, zero, own, ridge, own + ridge, 0.0, torch.zeros_like(direction), direction)
    b = gram_matrix(system.associations, new.direction[None])[:, 0]
    c = gram_matrix([new], system.directions)[0]
    same = torch.tensor([float(a.subject == new.subject) for a in system.associations], dtype=torch.float64)
    if not mode.rule.superposes_subjects:
        same.zero_()
    values = torch.stack([a.value for a in system.associations], 1).double()
    shared = b * same / own if own else torch.zeros_like(b)
    right = torch.stack([b, shared], 1)
    solved = yield from solve_any_rank(system.factors, right)
    z, y = solved[:, 0], solved[:, 1]
    yield Progress(Phase.GUARD, 1, 1)
    directions = system.directions.double()
    return _Bordering(
        same_subject=values @ (c * same / system.diagonal).where(system.diagonal != 0, 0),
        overlap=system.solution.T @ c,
        own=own,
        ridge=system.ridge,
        pivot=own + system.ridge - float(c @ z),
        exchange=float(c @ y),
        shared=directions.T @ y,
        remainder=direction - directions.T @ z,
    )
