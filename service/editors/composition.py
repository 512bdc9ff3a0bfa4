"""A version's weights as a closed form of the associations active at it: order-free, exact, reversible.

    G = U^T K + eps I        M_ij = 1 if associations i and j have the same subject, else 0
    W = W0 + Delta D^-1 (M * G) G^-1 U^T        U = C^-1 K        D = diag(U^T K)

Superpose within a subject, isolate across subjects. K (D, n) are the keys, Delta (d, n) the changes of value. What the
change should do at key j is sum_i M_ij delta_i G_ij / D_ii, the sum of the plain rank-one updates of j's own subject;
the change of least C-norm that does this at every key is the right-hand side. Two identities hold exactly, whatever eps:
one association gives ROME's rank-one update delta (C^-1 k)^T / (k^T C^-1 k), and associations of one subject give the plain
sum of theirs. (eps stands on both sides of the inverse, unlike in a usual ridge: it damps nothing but the exchange between
subjects whose keys nearly coincide.) The directions U are as they were found: where the statistics have changed
since, U^T K is not symmetric, and each key still gets its own change alone.

All of it is a function of the set of associations: sorted first, multiplied and solved in fp64 in one fixed order. What is
as long as a key stays as it is stored, fp32, and is widened a few columns at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from safetensors.torch import load, save
from torch import Tensor

from service.models.memory import CUT
from service.models.precision import double_device

RIDGE = 1e-3  # eps, as a multiple of the mean of D


@dataclass(frozen=True)
class Association:
    """One key and the change of value it shall bring about at one layer, found on the base model."""

    edit: str  #: id of the edit; the canonical order
    subject: str
    layer: int
    key: Tensor = field(repr=False)  #: k (D,)
    direction: Tensor = field(repr=False)  #: C^-1 k (D,)
    value: Tensor = field(repr=False)  #: delta (d,): the change of the down-projection's output at k

    def scaled(self, strength: float) -> Association:
        return replace(self, value=self.value * strength)

    def rank_one(self) -> LowRank:
        """ROME's own update: delta (C^-1 k)^T / (k^T C^-1 k)."""
        key, direction = self.key.double(), self.direction.double()
        return LowRank((self.value.double() / (key @ direction))[:, None], direction[None, :])


@dataclass(frozen=True)
class LowRank:
    """A change of a weight, left @ right: left (d, n) in fp64; right (n, D), which is widened to fp64 where it is used."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    edits: tuple[str, ...] = ()  #: where known, the edit behind each of the n terms

    def cut(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some columns at a time: which, left (d, n), and those of right (n, c), both in fp64 on a device."""
        left = self.left.to(device)
        for at in _columns(self.right):
            yield at, left, self.right[:, at].to(device).double()

    def dense(self) -> Tensor:
        """(d, D)."""
        return torch.cat([left @ right for _, left, right in self.cut()], 1)

    def norm(self) -> float:
        """The Frobenius norm. Of few terms by R of right^T = Q R, since |left right| = |left R^T|; else of all columns.

        The gram matrices of both factors would give it, too, but lose half of the digits where terms cancel.
        """
        if 2 * self.left.shape[1] < self.left.shape[0]:
            return float((self.left @ torch.linalg.qr(self.right.double().T, mode="r").R.T).norm())
        return math.hypot(*(float((left @ right).norm()) for _, left, right in self.cut()))

    def minus(self, other: LowRank) -> LowRank:
        """The difference of two changes. An edit that both know has one direction, so that its terms become one."""
        mine = {edit: i for i, edit in enumerate(self.edits)}
        shared = {i: mine[edit] for i, edit in enumerate(other.edits) if edit in mine}
        rest = [i for i in range(other.left.shape[1]) if i not in shared]
        left = torch.cat([self.left, -other.left[:, rest]], 1)
        left[:, list(shared.values())] -= other.left[:, list(shared)]
        return LowRank(left, torch.cat([self.right, other.right[rest]]))


def _columns(rows: Tensor) -> list[slice]:
    """The columns of (n, D), cut."""
    return [slice(at, at + CUT) for at in range(0, rows.shape[1], CUT)]


def compose_layer(associations: Sequence[Association], ridge: float = RIDGE) -> LowRank:
    """The joint change for associations of one layer. Solved in fp64; sorted first, so that order never matters."""
    ordered = sorted(associations, key=lambda a: a.edit)
    keys = torch.stack([a.key for a in ordered])  # (n, D)
    directions = torch.stack([a.direction for a in ordered])  # (n, D)
    values = torch.stack([a.value for a in ordered], 1).double()  # (d, n)
    gram = torch.zeros(len(ordered), len(ordered), dtype=torch.float64)  # of key i and direction j
    for at in _columns(keys):
        gram.addmm_(keys[:, at].double(), directions[:, at].double().T)
    own = gram.diagonal().clone()
    gram.diagonal().add_(ridge * own.mean())
    wanted = values * (gram.diagonal() / own)  # at each key: Delta D^-1 (M * G)
    for rows in _subjects(ordered):
        if len(rows) > 1:
            wanted[:, rows] = values[:, rows] @ (gram[rows][:, rows].T / own[rows, None])
    with _one_thread():
        left = torch.linalg.solve(gram, wanted.T).T
    return LowRank(left, directions, tuple(a.edit for a in ordered))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A factorisation's last bits depend on the number of threads, unlike a product's: so replicas agree whatever they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _subjects(associations: Sequence[Association]) -> list[list[int]]:
    """The places of each subject's associations."""
    places: dict[str, list[int]] = {}
    for i, a in enumerate(associations):
        places.setdefault(a.subject, []).append(i)
    return list(places.values())


def compose(associations: Iterable[Association], ridge: float = RIDGE) -> dict[int, LowRank]:
    """The joint change of every layer that the associations touch."""
    by_layer = sorted(associations, key=lambda a: a.layer)
    return {layer: compose_layer(list(group), ridge) for layer, group in groupby(by_layer, lambda a: a.layer)}


def rebuild(base: Tensor, change: LowRank, conv1d: bool) -> Tensor:
    """The edited weight, from the untouched base bytes: fp64 on its own device, then cast once to its dtype.

    base: (D, d) when `conv1d`, else (d, D): decided by the architecture, never by comparing shapes.
    """
    exact = double_device(base.device)
    edited = torch.empty_like(base)
    for at, left, right in change.cut(exact):
        if conv1d:
            edited[at] = (right.T @ left.T).add_(base[at].to(exact)).to(base.dtype)
        else:
            edited[:, at] = (left @ right).add_(base[:, at].to(exact)).to(base.dtype)
    return edited


def norm_ratio(base: Tensor, change: LowRank) -> float:
    """|change| / |base| in Frobenius norm."""
    return change.norm() / float(torch.linalg.vector_norm(base, dtype=torch.float64))


def pack(associations: Sequence[Association]) -> bytes:
    """Safetensors: key, direction and value of each layer, and the rank-one factors as applied alone."""
    tensors: dict[str, Tensor] = {}
    for a in associations:
        factors = a.rank_one()
        parts: Mapping[str, Tensor] = {
            "key": a.key.float(),
            "direction": a.direction.float(),
            "value": a.value.float(),
            "left": factors.left[:, 0].float(),
            "right": factors.right[0].float(),
        }
        tensors |= {f"layer.{a.layer}.{name}": t.contiguous().cpu() for name, t in parts.items()}
    return save(tensors)


def unpack(data: bytes, edit: str, subject: str) -> list[Association]:
    """The associations of one edit from `pack`'s bytes."""
    tensors = load(data)
    layers = sorted({int(name.split(".")[1]) for name in tensors})
    return [
        Association(edit, subject, x, *(tensors[f"layer.{x}.{p}"] for p in ("key", "direction", "value")))
        for x in layers
    ]
