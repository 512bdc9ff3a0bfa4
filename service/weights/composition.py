"""A version's weights as a function of the pieces of the edits active at it: order-free, exact, reversible.

A piece is an association, a key and the change of value at it, or an addend, the change of a whole weight. The associations of
one form at one layer are solved together; what the forms come to, and the addends, are added in one fixed order. The form
"joint" is the service's own:

    G = U^T K + eps I        M_ij = 1 if associations i and j have the same subject, else 0
    W = W0 + Delta D^-1 (M * G) G^-1 U^T        U = C^-1 K        D = diag(U^T K)

Superpose within a subject, isolate across subjects. K (D, n) are the keys, Delta (d, n) the changes of value. What the
change should do at key j is sum_i M_ij delta_i G_ij / D_ii, the sum of the plain rank-one updates of j's own subject;
the change of least C-norm that does this at every key is the right-hand side. Two identities hold exactly, whatever eps:
one association gives ROME's rank-one update delta (C^-1 k)^T / (k^T C^-1 k), and associations of one subject give the plain
sum of theirs. (eps stands on both sides of the inverse, unlike in a usual ridge: it damps nothing but the exchange between
subjects whose keys nearly coincide.) The directions U are as they were found: where the statistics have changed
since, U^T K is not symmetric, and each key still gets its own change alone.

The other forms are those of methods that write many associations at once (methods C). All are one formula,

    W = W0 + Delta (U^T K + ridge I)^-1 U^T

with U = C^-1 K and ridge = lambda for MEMIT, U = C^-1 K and a small ridge for EMMET (none for a lone association), and U = P K,
P the projection onto what the statistics hardly use, and ridge = L2 for AlphaEdit. Here they are solved for all active
edits at once, from the base weights, where the authors write batch upon batch.

All of it is a function of the set of associations: sorted first, multiplied and solved in fp64 in one fixed order. What is
as long as a key stays as it is stored, fp32, and is widened a few columns at a time. Addends know nothing of each other and of
the associations: they are summed in fp64 in the order of the edits' ids, so that they are exact and free of order, too; but
nothing isolates one from another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from service.models.loading import WeightRef
from service.models.precision import fp64_device
from service.weights.factors import Association, EditUpdate, LowRank, SolveMode, column_slices


def compose_layer(associations: Sequence[Association], solve_mode: SolveMode | None = None) -> LowRank:
    """The change for associations of one form and layer. Solved in fp64; sorted first, so that order never matters."""
    ordered = sorted(associations, key=lambda a: a.edit)
    solve_mode = solve_mode or ordered[0].solve_mode
    directions = torch.stack([a.direction for a in ordered])  # (n, D)
    values = torch.stack([a.value for a in ordered], 1).double()  # (d, n)
    gram = gram_matrix(ordered, directions)
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(solve_mode.ridge_for(diagonal))
    targets = (
        _superpose_by_subject(ordered, values, gram, diagonal)
        if solve_mode.rule.superposes_subjects
        else values
    )
    with single_threaded():
        left = torch.linalg.solve(gram, targets.T).T
    return LowRank(left, directions, tuple(a.edit for a in ordered))


def gram_matrix(associations: Sequence[Association], directions: Tensor) -> Tensor:
    """Of key i and direction j, (n, m), in fp64; directions (m, D)."""
    keys = torch.stack([a.key for a in associations])  # (n, D)
    gram = torch.zeros(len(keys), len(directions), dtype=torch.float64)
    for at in column_slices(keys):
        gram.addmm_(keys[:, at].double(), directions[:, at].double().T)
    return gram


def _superpose_by_subject(
    ordered: Sequence[Association], values: Tensor, gram: Tensor, diagonal: Tensor
) -> Tensor:
    """What shall happen at each key: Delta D^-1 (M * G), (d, n)."""
    targets = values * (gram.diagonal() / diagonal)
    for rows in _rows_by_subject(ordered):
        if len(rows) > 1:
            targets[:, rows] = values[:, rows] @ (gram[rows][:, rows].T / diagonal[rows, None])
    return targets


@contextmanager
def single_threaded() -> Iterator[None]:
    """A factorisation's last bits depend on the number of threads, unlike a product's: so replicas agree whatever they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows_by_subject(associations: Sequence[Association]) -> list[list[int]]:
    """The places of each subject's associations."""
    rows_by_subject: dict[str, list[int]] = {}
    for i, a in enumerate(associations):
        rows_by_subject.setdefault(a.subject, []).append(i)
    return list(rows_by_subject.values())


@dataclass(frozen=True)
class WeightDelta:
    """What a version changes in one weight: what its associations were solved to, and the sum of its addends."""

    low_rank_terms: tuple[LowRank, ...] = ()  #: of each form
    dense_term: Tensor | None = field(default=None, repr=False)  #: (out, in), fp64

    def column_blocks(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Some columns at a time: which, and the change (out, n) of these in fp64 on a device; the caller's own to write into."""
        block_iterators = [low.column_blocks(device) for low in self.low_rank_terms]
        if self.dense_term is not None:
            block_iterators.append(self._dense_blocks(device))
        for blocks in zip(*block_iterators, strict=True):
            total = blocks[0][1]
            for _, more in blocks[1:]:
                total += more
            yield blocks[0][0], total

    def _dense_blocks(self, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
        assert self.dense_term is not None
        for at in column_slices(self.dense_term):
            yield at, self.dense_term[:, at].to(device, copy=True)

    def dense(self) -> Tensor:
        """(out, in)."""
        return torch.cat([change for _, change in self.column_blocks()], 1)

    def norm(self) -> float:
        """The Frobenius norm."""
        if len(self.low_rank_terms) == 1 and self.dense_term is None:
            return self.low_rank_terms[0].norm()
        return math.hypot(*(float(change.norm()) for _, change in self.column_blocks()))

    def minus(self, other: WeightDelta) -> WeightDelta:
        """The difference of two changes of one weight."""
        if (
            len(self.low_rank_terms) == len(other.low_rank_terms) == 1
            and self.dense_term is None
            and other.dense_term is None
        ):
            return WeightDelta((self.low_rank_terms[0].minus(other.low_rank_terms[0]),))
        negative = tuple(replace(low, left=-low.left) for low in other.low_rank_terms)
        mine, theirs = self.dense_term, other.dense_term
        dense_term = mine if theirs is None else -theirs if mine is None else mine - theirs
        return WeightDelta((*self.low_rank_terms, *negative), dense_term)


def compose(updates: Iterable[EditUpdate]) -> dict[WeightRef, WeightDelta]:
    """The change of every weight that the pieces touch."""
    ordered = sorted(updates, key=lambda p: (p.weight_ref, p.edit))
    return {site: _compose_weight(list(group)) for site, group in groupby(ordered, lambda p: p.weight_ref)}


def _compose_weight(updates: Sequence[EditUpdate]) -> WeightDelta:
    by_mode: dict[SolveMode, list[Association]] = {}
    dense_sum: Tensor | None = None
    for update in updates:
        if isinstance(update, Association):
            by_mode.setdefault(update.solve_mode, []).append(update)
        else:
            update_change = update.change.double()
            dense_sum = update_change if dense_sum is None else dense_sum + update_change
    return WeightDelta(tuple(compose_layer(by_mode[form]) for form in sorted(by_mode)), dense_sum)


def apply_delta(base: Tensor, delta: WeightDelta | LowRank, conv1d: bool) -> Tensor:
    """The edited weight, from the untouched base bytes: fp64 on its own device, then cast once to its dtype.

    base: (in, out) when `conv1d`, else (out, in): decided by the architecture, never by comparing shapes.
    """
    compute_device = fp64_device(base.device)
    edited = torch.empty_like(base)
    for at, block in delta.column_blocks(compute_device):
        if conv1d:
            edited[at] = block.T.add_(base[at].to(compute_device)).to(base.dtype)
        else:
            edited[:, at] = block.add_(base[:, at].to(compute_device)).to(base.dtype)
    return edited


def norm_ratio(base: Tensor, delta: WeightDelta | LowRank) -> float:
    """|change| / |base| in Frobenius norm."""
    return delta.norm() / float(torch.linalg.vector_norm(base, dtype=torch.float64))
