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
from safetensors.torch import load, save
from torch import Tensor

from service.models.loading import WeightRef
from service.models.memory_estimates import COLUMN_BLOCK
from service.models.precision import fp64_device

DEFAULT_RIDGE = 1e-3  # eps, as a multiple of the mean of D, where a recipe says nothing else


@dataclass(frozen=True, order=True)
class SolveMode:
    """How associations of one layer are solved together."""

    name: str = "joint"
    ridge: float = DEFAULT_RIDGE  #: joint: a multiple of the mean of D; the others: itself

    def ridge_for(self, diagonal: Tensor) -> float:
        """What is added to the gram matrix's diagonal `own` (n,)."""
        if self.name == "joint":
            return self.ridge * float(diagonal.mean())
        return 0.0 if self.name == "emmet" and len(diagonal) == 1 else self.ridge


JOINT = SolveMode()


@dataclass(frozen=True)
class Association:
    """One key and the change of value it shall bring about at one layer, found on the base model."""

    edit: str  #: id of the edit; the canonical order
    subject: str
    layer: int
    key: Tensor = field(repr=False)  #: k (D,)
    direction: Tensor = field(repr=False)  #: C^-1 k (D,); AlphaEdit: P k
    value: Tensor = field(repr=False)  #: delta (d,): the change of the down-projection's output at k
    solve_mode: SolveMode = JOINT

    @property
    def weight_ref(self) -> WeightRef:
        return WeightRef(self.layer)

    def scaled(self, strength: float) -> Association:
        return replace(self, value=self.value * strength)

    def rank_one(self) -> LowRank:
        """What it comes to alone: ROME's own update delta (C^-1 k)^T / (k^T C^-1 k), less where its form has a ridge."""
        key, direction = self.key.double(), self.direction.double()
        own = (key @ direction)[None]
        if self.solve_mode.name != "joint":
            own = own + self.solve_mode.ridge_for(own)
        return LowRank((self.value.double() / own)[:, None], direction[None, :])


@dataclass(frozen=True)
class DenseUpdate:
    """A change of a whole weight, as training makes it: not an association at one key."""

    edit: str
    subject: str
    weight_ref: WeightRef
    change: Tensor = field(repr=False)  #: (out, in)

    @property
    def layer(self) -> int:
        return self.weight_ref.layer

    def scaled(self, strength: float) -> DenseUpdate:
        return replace(self, change=self.change * strength)


EditUpdate = Association | DenseUpdate


@dataclass(frozen=True)
class LowRank:
    """A change of a weight, left @ right: left (d, n) in fp64; right (n, D), which is widened to fp64 where it is used."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    edits: tuple[str, ...] = ()  #: where known, the edit behind each of the n terms

    def column_blocks(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Some columns at a time: which, and the change (d, c) of these in fp64 on a device."""
        left = self.left.to(device)
        for at in _column_slices(self.right):
            yield at, left @ self.right[:, at].to(device).double()

    def dense(self) -> Tensor:
        """(d, D)."""
        return torch.cat([change for _, change in self.column_blocks()], 1)

    def norm(self) -> float:
        """The Frobenius norm. Of few terms by R of right^T = Q R, since |left right| = |left R^T|; else of all columns.

        The gram matrices of both factors would give it, too, but lose half of the digits where terms cancel.
        """
        if 2 * self.left.shape[1] < self.left.shape[0]:
            return float((self.left @ torch.linalg.qr(self.right.double().T, mode="r").R.T).norm())
        return math.hypot(*(float(change.norm()) for _, change in self.column_blocks()))

    def minus(self, other: LowRank) -> LowRank:
        """The difference of two changes. An edit that both know has one direction, so that its terms become one."""
        own_index = {edit: i for i, edit in enumerate(self.edits)}
        shared = {i: own_index[edit] for i, edit in enumerate(other.edits) if edit in own_index}
        only_other = [i for i in range(other.left.shape[1]) if i not in shared]
        left = torch.cat([self.left, -other.left[:, only_other]], 1)
        left[:, list(shared.values())] -= other.left[:, list(shared)]
        return LowRank(left, torch.cat([self.right, other.right[only_other]]))


def _column_slices(matrix: Tensor) -> list[slice]:
    """The columns of (n, D), cut."""
    return [slice(at, at + COLUMN_BLOCK) for at in range(0, matrix.shape[1], COLUMN_BLOCK)]


def compose_layer(associations: Sequence[Association], solve_mode: SolveMode | None = None) -> LowRank:
    """The change for associations of one form and layer. Solved in fp64; sorted first, so that order never matters."""
    ordered = sorted(associations, key=lambda a: a.edit)
    solve_mode = solve_mode or ordered[0].solve_mode
    directions = torch.stack([a.direction for a in ordered])  # (n, D)
    values = torch.stack([a.value for a in ordered], 1).double()  # (d, n)
    gram = gram_matrix(ordered, directions)
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(solve_mode.ridge_for(diagonal))
    targets = _superpose_by_subject(ordered, values, gram, diagonal) if solve_mode.name == "joint" else values
    with single_threaded():
        left = torch.linalg.solve(gram, targets.T).T
    return LowRank(left, directions, tuple(a.edit for a in ordered))


def gram_matrix(associations: Sequence[Association], directions: Tensor) -> Tensor:
    """Of key i and direction j, (n, m), in fp64; directions (m, D)."""
    keys = torch.stack([a.key for a in associations])  # (n, D)
    gram = torch.zeros(len(keys), len(directions), dtype=torch.float64)
    for at in _column_slices(keys):
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
        for at in _column_slices(self.dense_term):
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


def serialize_updates(updates: Sequence[EditUpdate]) -> bytes:
    """Safetensors. Of an association: key, direction and value, and the rank-one factors as applied alone; its form where it is
    not the joint one. Of an addend: the change of its weight."""
    tensors: dict[str, Tensor] = {}
    for update in updates:
        named_tensors = (
            _association_tensors(update) if isinstance(update, Association) else _dense_update_tensors(update)
        )
        tensors |= {name: t.contiguous().cpu() for name, t in named_tensors.items()}
    return save(tensors)


def _association_tensors(a: Association) -> dict[str, Tensor]:
    factors, prefix = a.rank_one(), f"layer.{a.layer}"
    parts = {
        f"{prefix}.key": a.key.float(),
        f"{prefix}.direction": a.direction.float(),
        f"{prefix}.value": a.value.float(),
        f"{prefix}.left": factors.left[:, 0].float(),
        f"{prefix}.right": factors.right[0].float(),
    }
    if a.solve_mode != JOINT:
        parts[f"{prefix}.form.{a.solve_mode.name}"] = torch.tensor([a.solve_mode.ridge], dtype=torch.float64)
    return parts


def _dense_update_tensors(a: DenseUpdate) -> dict[str, Tensor]:
    return {f"weight.{a.weight_ref.layer}.{a.weight_ref.part}": a.change.float()}


def deserialize_updates(data: bytes, edit: str, subject: str) -> list[EditUpdate]:
    """The pieces of one edit from `pack`'s bytes."""
    tensors = load(data)
    names = [name.split(".") for name in sorted(tensors)]
    modes = {
        int(words[1]): SolveMode(words[3], float(tensors[".".join(words)]))
        for words in names
        if words[2] == "form"
    }
    layers = sorted({int(words[1]) for words in names if words[0] == "layer"})
    associations: list[EditUpdate] = [
        Association(
            edit,
            subject,
            x,
            tensors[f"layer.{x}.key"],
            tensors[f"layer.{x}.direction"],
            tensors[f"layer.{x}.value"],
            modes.get(x, JOINT),
        )
        for x in layers
    ]
    dense_weights = [WeightRef(int(words[1]), words[2]) for words in names if words[0] == "weight"]
    return associations + [
        DenseUpdate(edit, subject, s, tensors[f"weight.{s.layer}.{s.part}"]) for s in sorted(dense_weights)
    ]
