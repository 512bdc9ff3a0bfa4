"""The change that one edit adds to a set of other edits, without composing a version for each edit.

For the associations of one layer and one solve mode let H = U^T K + ridge I be the system of the other edits, with
entries H_rc = k_r^T u_c, and X its solution for their targets (`service/weights/composition.py`). An edit with m keys
k_i, directions u_i and changes of value delta_i, the columns of Delta (d, m), borders the system:

    [ H    B ] [ X' ]   [ T + E Delta^T ]        B_ri = k_r^T u_i        C_ri = k_i^T u_r
    [ C^T  S ] [ x  ] = [ t             ]        S_ij = k_i^T u_j, plus the ridge where i = j

E_ri is B_ri / k_i^T u_i where r has the edit's subject, else 0.

With Z = H^-1 B and Y = H^-1 E, block elimination gives (S - C^T Z) x = t - C^T X - C^T Y Delta^T, and the change of the
weight is of rank 2 m at most:

    X'^T U^T + x^T U_e^T - X^T U^T = Delta (U Y)^T + x^T (U_e - U Z)^T          U_e = [u_1 .. u_m]

E and Y are zero in the modes that do not superpose the edits of a subject. H has the ridge of the version
that contains all new edits. Where nothing is solved the change of an edit is its own products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.loading import WeightRef
from service.weights.composition import compose_layer, gram_matrix, gram_matrix_in_steps, superpose_by_subject
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
    """What the associations of a new edit add to a system, apart from the size of their changes of value."""

    same_subject: (
        Tensor  #: (d, m): what the other associations of the subject add to the targets at the new keys
    )
    overlap: Tensor  #: X^T C (d, m)
    own: Tensor  #: k_i^T u_i, (m,)
    system: Tensor  #: S (m, m), with the ridge
    pivot: AnyRankFactors  #: of S - C^T Z
    exchange: Tensor  #: C^T Y (m, m)
    shared: Tensor  #: U Y, as rows (m, D)
    remainder: Tensor  #: U_e - U Z, as rows (m, D)


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
            for edit, group in groupby(new, lambda a: a.edit):
                bordering = yield from _border(system, list(group), place[1])
                borderings[edit, place[0]] = bordering
        return cls(borderings)

    def norm(self, updates: Sequence[EditUpdate]) -> float:
        """Return the Frobenius norm of the change that the updates of one edit add to one weight, at the strength that
        they have; 0 for those that are looked up, and infinite where a key cannot get the value that is its own."""
        dense = [u.change.double() for u in updates if isinstance(u, DenseUpdate)]
        if dense:
            return float(torch.stack(dense).sum(0).norm())
        written = [u for u in updates if isinstance(u, Association) and u.gate is None]
        if not written:
            return 0.0
        bordering = self._borderings.get((written[0].edit, written[0].weight_ref))
        if (
            bordering is not None
            and written[0].solve_mode.rule.superposes_subjects
            and not bordering.own.all()
        ):
            return math.inf
        return self.change(written).norm()

    def change(self, updates: Sequence[Association]) -> LowRank:
        """Return the change that the associations of one edit add at one layer."""
        ordered = sorted(updates, key=lambda a: a.order)
        mode = ordered[0].solve_mode
        if not mode.rule.solved:
            return compose_layer(ordered)
        b = self._borderings[ordered[0].edit, ordered[0].weight_ref]
        delta = torch.stack([a.value for a in ordered], 1).double()  # (d, m)
        targets = delta
        if mode.rule.superposes_subjects:
            targets = delta @ (b.system.T / b.own[:, None]) + b.same_subject
        right = (targets - b.overlap - delta @ b.exchange.T).T
        x = run_to_completion(solve_any_rank(b.pivot, right))  # (m, d)
        return LowRank(torch.cat([delta, x.T], 1), torch.cat([b.shared, b.remainder]))


def _by_place(updates: Sequence[EditUpdate]) -> dict[tuple[WeightRef, SolveMode], list[Association]]:
    """Return the associations of each weight and solve mode that is solved, in their order."""
    places: dict[tuple[WeightRef, SolveMode], list[Association]] = {}
    written = [u for u in updates if isinstance(u, Association) and u.gate is None]
    for update in sorted(written, key=lambda a: a.order):
        if update.solve_mode.rule.solved:
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


def _border(system: _System | None, new: Sequence[Association], mode: SolveMode) -> Stepper[_Bordering]:
    """Return the bordering of the associations of a new edit."""
    directions = torch.stack([a.direction for a in new])  # (m, D)
    own_gram = gram_matrix(new, directions)
    own, count = own_gram.diagonal().clone(), len(new)
    ridge = mode.ridge_for(own) if system is None else system.ridge
    own_gram.diagonal().add_(ridge)
    wide = directions.double()
    if system is None:
        nothing = torch.zeros(len(new[0].value), count, dtype=torch.float64)
        pivot = yield from factorize_any_rank(own_gram)
        no_exchange = torch.zeros(count, count, dtype=torch.float64)
        return _Bordering(nothing, nothing, own, own_gram, pivot, no_exchange, torch.zeros_like(wide), wide)
    b = gram_matrix(system.associations, directions)  # (n, m)
    c = gram_matrix(new, system.directions).T  # (n, m)
    same = torch.tensor(
        [float(a.subject == new[0].subject) for a in system.associations], dtype=torch.float64
    )
    if not mode.rule.superposes_subjects:
        same.zero_()
    values = torch.stack([a.value for a in system.associations], 1).double()
    shared = (b * same[:, None] / own).where(own != 0, 0)
    right = torch.cat([b, shared], 1)
    solved = yield from solve_any_rank(system.factors, right)
    z, y = solved[:, :count], solved[:, count:]
    yield Progress(Phase.GUARD, 1, 1)
    pivot = yield from factorize_any_rank(own_gram - c.T @ z)
    others = system.directions.double()
    scale = (same / system.diagonal).where(system.diagonal != 0, 0)
    return _Bordering(
        same_subject=values @ (c * scale[:, None]),
        overlap=system.solution.T @ c,
        own=own,
        system=own_gram,
        pivot=pivot,
        exchange=c.T @ y,
        shared=y.T @ others,
        remainder=wide - z.T @ others,
    )
