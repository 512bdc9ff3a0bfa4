"""The weights of a version as a function of the set of edits active at it: independent of order, exact, reversible.

The updates of an edit are associations (a key and the change of value at it) or dense updates (the change of a whole
weight). The associations of one layer and one solve mode are solved together. The results of the modes and the dense
updates are added in one fixed order. The mode "joint" is the service's own:

    G = U^T K + eps I        M_ij = 1 if associations i and j have the same subject, else 0
    W = W0 + Delta D^-1 (M * G) G^-1 U^T        U = C^-1 K        D = diag(U^T K)

It superposes the edits of one subject and isolates those of different subjects. K (D, n) are the keys, Delta (d, n) the
changes of value. The target at key j is sum_i M_ij delta_i G_ij / D_ii, the sum of the rank-one updates of j's own
subject (ROME, Meng et al. 2022, Eq. 2); the right-hand side is the change of least C-norm that attains every target.
Two identities hold exactly, whatever eps is: one association gives ROME's rank-one update delta (C^-1 k)^T / (k^T C^-1
k), and the associations of one subject give the sum of theirs. (eps is on both sides of the inverse, unlike in a usual
ridge: it damps only the exchange between subjects whose keys nearly coincide.) The directions U are those that were
stored with the edits: where the statistics have changed since, U^T K is not symmetric, and each key still gets its own
change alone.

The keys and directions of imported edits can be anything, and a revert can lead to any subset of the edits. So every
set has a version with finite weights (docs/decisions/0017): where the system is singular, the solution of least norm is
taken, and a weight beyond the range of its dtype becomes the largest number of the dtype. The guard rejects an edit
that reaches that.

The other modes are those of methods that write many associations at once. All are one formula,

    W = W0 + Delta (U^T K + ridge I)^-1 U^T

with U = C^-1 K and ridge = lambda for MEMIT (Meng et al. 2023, Eq. 14), U = C^-1 K and a small ridge for EMMET (none
for a single association; Gupta et al. 2024), and U = P K, P the projection onto the null space of the statistics, and
ridge = L2 for AlphaEdit (Fang et al. 2025). Here they are solved for all active edits at once, from the base weights,
where the authors write batch upon batch. UltraEdit (Gu et al. 2026) has several associations for each edit, one for
each token of its object, with ridge = lambda and U = C^-1 K or U = K. By (lambda C + K K^T)^-1 K = C^-1 K (lambda I +
K^T C^-1 K)^-1 this is the least-squares form that its authors solve, with lambda C in place of lambda I.

Rules that solve nothing add the products of values and directions, Delta U^T (knowledge neurons, Dai et al. 2022). Of
equal products one counts, so that a column that two edits erase is 0.

All of it is a function of the set of updates: sorted first, multiplied and solved in fp64 in one fixed order. Keys and
directions stay fp32, as stored, and are converted a few columns at a time. Dense updates are summed in fp64 in the
order of the edits' ids, so that the sum is independent of order too; nothing isolates one from another.

Each computation is a stepper, whose steps stay short whatever the number of active edits, and has a blocking twin. Both
run the same operations in the same order, so that they give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.loading import WeightRef
from service.models.precision import fp64_device
from service.weights.factors import (
    Association,
    DenseUpdate,
    EditUpdate,
    LowRank,
    SolveMode,
    WeightUpdate,
    column_slices,
    weight_updates,
)
from service.weights.solve import factorize_any_rank, solve_any_rank

GRAM_ROWS = 256  # rows of a gram matrix that one step computes
GRAM_SPLIT_SIZE = 512  # rows of the largest gram matrix that is not split
TARGET_ROWS = 64  # rows of the targets of one subject that one step computes


def compose_layer(associations: Sequence[Association], solve_mode: SolveMode | None = None) -> LowRank:
    """Run `compose_layer_in_steps` to completion."""
    return run_to_completion(compose_layer_in_steps(associations, solve_mode))


def compose_layer_in_steps(
    associations: Sequence[Association], solve_mode: SolveMode | None = None
) -> Stepper[LowRank]:
    """Return the change for the associations of one layer and solve mode, solved in fp64."""
    ordered = sorted(associations, key=lambda a: a.order)
    solve_mode = solve_mode or ordered[0].solve_mode
    if not solve_mode.rule.solved:
        return _sum_of_products(ordered)
    directions = torch.stack([a.direction for a in ordered])  # (n, D)
    values = torch.stack([a.value for a in ordered], 1).double()  # (d, n)
    gram = yield from gram_matrix_in_steps(ordered, directions)
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(solve_mode.ridge_for(diagonal))
    targets = values
    if solve_mode.rule.superposes_subjects:
        targets = yield from superpose_by_subject(ordered, values, gram, diagonal)
    factors = yield from factorize_any_rank(gram)
    solution = yield from solve_any_rank(factors, targets.T)
    return LowRank(solution.T, directions)


def _sum_of_products(ordered: Sequence[Association]) -> LowRank:
    """Return the sum of the products of values and directions; of equal ones one counts."""
    found: dict[tuple[bytes, bytes], Association] = {}
    for a in ordered:
        found.setdefault((a.direction.numpy().tobytes(), a.value.numpy().tobytes()), a)
    values = torch.stack([a.value for a in found.values()], 1).double()
    return LowRank(values, torch.stack([a.direction for a in found.values()]))


def gram_matrix(associations: Sequence[Association], directions: Tensor) -> Tensor:
    """Run `gram_matrix_in_steps` to completion."""
    return run_to_completion(gram_matrix_in_steps(associations, directions))


def gram_matrix_in_steps(associations: Sequence[Association], directions: Tensor) -> Stepper[Tensor]:
    """Return the products of key i and direction j, (n, m) in fp64; directions (m, D)."""
    keys = torch.stack([a.key for a in associations])  # (n, D)
    gram = torch.zeros(len(keys), len(directions), dtype=torch.float64)
    slices = column_slices(keys)
    for number, at in enumerate(slices):
        columns = directions[:, at].double().T
        for rows in _gram_row_slices(len(keys)):
            gram[rows].addmm_(keys[rows, at].double(), columns)
            yield Progress(Phase.COMPOSE, number, len(slices))
    return gram


def _gram_row_slices(n: int) -> list[slice]:
    """Return slices of at least GRAM_ROWS rows each: products of very few rows use other kernels, with other last
    bits."""
    if n <= GRAM_SPLIT_SIZE:
        return [slice(0, n)]
    starts = range(0, n - GRAM_ROWS + 1, GRAM_ROWS)
    return [slice(at, at + GRAM_ROWS if at != starts[-1] else n) for at in starts]


def superpose_by_subject(
    ordered: Sequence[Association], values: Tensor, gram: Tensor, diagonal: Tensor
) -> Stepper[Tensor]:
    """Return the targets at each key, Delta D^-1 (M * G), (d, n). `gram` is G, and `diagonal` is D."""
    targets = values * (gram.diagonal() / diagonal).where(diagonal != 0, 0)
    for rows in _rows_by_subject(ordered):
        if len(rows) < 2:
            continue
        own = diagonal[rows, None]
        exchange = (gram[rows][:, rows].T / own).where(
            own != 0, 0
        )  # an edit without a direction changes nothing
        own_values = values[:, rows]
        step = len(own_values) if len(rows) <= GRAM_SPLIT_SIZE else TARGET_ROWS
        parts: list[Tensor] = []
        for start in range(0, len(own_values), step):
            parts.append(own_values[start : start + step] @ exchange)
            yield Progress(Phase.COMPOSE, 1, 1)
        targets[:, rows] = torch.cat(parts)
    return targets


def _rows_by_subject(associations: Sequence[Association]) -> list[list[int]]:
    """Return the positions of each subject's associations."""
    rows_by_subject: dict[str, list[int]] = {}
    for i, a in enumerate(associations):
        rows_by_subject.setdefault(a.subject, []).append(i)
    return list(rows_by_subject.values())


@dataclass(frozen=True)
class WeightDelta:
    """The change of one weight at a version: one low-rank term for each solve mode, and the sum of the dense
    updates."""

    low_rank_terms: tuple[LowRank, ...] = ()  #: one for each solve mode
    dense_term: Tensor | None = field(default=None, repr=False)  #: (out, in), fp64

    def column_blocks(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of columns and the change (out, n) of these columns in fp64 on a device. The caller may
        overwrite it."""
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
        """Return the whole change, (out, in)."""
        return torch.cat([change for _, change in self.column_blocks()], 1)


def compose(updates: Iterable[EditUpdate]) -> dict[WeightRef, WeightDelta]:
    """Run `compose_in_steps` to completion."""
    return run_to_completion(compose_in_steps(updates))


def compose_in_steps(updates: Iterable[EditUpdate]) -> Stepper[dict[WeightRef, WeightDelta]]:
    """Return the change of every weight that the updates touch. Those that are looked up touch none."""
    ordered = sorted(weight_updates(updates), key=lambda p: (p.weight_ref, p.edit))
    deltas: dict[WeightRef, WeightDelta] = {}
    for weight_ref, group in groupby(ordered, lambda p: p.weight_ref):
        deltas[weight_ref] = yield from _compose_weight(list(group))
    return deltas


def _compose_weight(updates: Sequence[WeightUpdate]) -> Stepper[WeightDelta]:
    by_mode: dict[SolveMode, list[Association]] = {}
    dense_sum: Tensor | None = None
    for update in updates:
        if isinstance(update, Association):
            by_mode.setdefault(update.solve_mode, []).append(update)
        else:
            change = update.change.double()
            dense_sum = change if dense_sum is None else dense_sum + change
            yield Progress(Phase.COMPOSE, 1, 1)
    terms: list[LowRank] = []
    for mode in sorted(by_mode):
        terms.append((yield from compose_layer_in_steps(by_mode[mode])))
    return WeightDelta(tuple(terms), dense_sum)


def apply_delta(base: Tensor, delta: WeightDelta | LowRank, conv1d: bool) -> Tensor:
    """Run `apply_delta_in_steps` to completion."""
    return run_to_completion(apply_delta_in_steps(base, delta, conv1d))


def apply_delta_in_steps(base: Tensor, delta: WeightDelta | LowRank, conv1d: bool) -> Stepper[Tensor]:
    """Return the edited weight: the base bytes plus the change in fp64 on the weight's device, cast once to its dtype.

    base: (in, out) when `conv1d`, else (out, in). The architecture decides, never a comparison of shapes. A number
    beyond the range of the dtype becomes the largest one, so that the weight is finite for every set of edits.
    """
    compute_device = fp64_device(base.device)
    largest = torch.finfo(base.dtype).max
    edited = torch.empty_like(base)
    for at, block in delta.column_blocks(compute_device):
        if conv1d:
            edited[at] = block.T.add_(base[at].to(compute_device)).clamp_(-largest, largest).to(base.dtype)
        else:
            edited[:, at] = (
                block.add_(base[:, at].to(compute_device)).clamp_(-largest, largest).to(base.dtype)
            )
        yield Progress(Phase.COMPOSE, at.stop, at.stop)
    return edited


def is_in_range(weight: Tensor) -> bool:
    """Whether no number of an edited weight was beyond the range of its dtype."""
    largest = torch.finfo(weight.dtype).max
    low, high = weight.aminmax()
    return bool((low > -largest) & (high < largest))


def is_change_in_range(update: WeightUpdate, dtype: torch.dtype) -> bool:
    """Whether the change of an update alone is within the range of a dtype."""
    if isinstance(update, DenseUpdate):
        largest_change = float(update.change.abs().max())
    else:
        alone = update.rank_one()
        largest_change = float(alone.left.abs().max()) * float(alone.right.abs().max())
    return largest_change < torch.finfo(dtype).max  # NaN is not
