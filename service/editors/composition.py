"""A version's weights as a closed form of the associations active at it: order-free, exact, reversible.

    G = K^T C^-1 K + eps I        M_ij = 1 if associations i and j have the same subject, else 0
    W = W0 + Delta D^-1 (M * G) G^-1 K^T C^-1         D = diag(K^T C^-1 K)

Superpose within a subject, isolate across subjects. K (D, n) are the keys, Delta (d, n) the changes of value. What the
change should do at key j is sum_i M_ij delta_i G_ij / D_ii, the sum of the plain rank-one updates of j's own subject;
the change of least C-norm that does this at every key is the right-hand side. Two identities hold exactly, whatever eps:
one association gives ROME's rank-one update delta (C^-1 k)^T / (k^T C^-1 k), and associations of one subject give the plain
sum of theirs. (eps stands on both sides of the inverse, unlike in a usual ridge: it damps nothing but the exchange between
subjects whose keys nearly coincide.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from safetensors.torch import load, save
from torch import Tensor

RIDGE = 1e-3  # eps, as a multiple of the mean of diag(K^T C^-1 K)


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
    """A change of a weight, left @ right: left (d, n), right (n, D), fp64."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)

    def dense(self) -> Tensor:
        """(d, D)."""
        return self.left @ self.right

    def minus(self, other: LowRank) -> LowRank:
        """The difference of two changes."""
        return LowRank(torch.cat([self.left, -other.left], 1), torch.cat([self.right, other.right]))


def compose_layer(associations: Sequence[Association], ridge: float = RIDGE) -> LowRank:
    """The joint change for associations of one layer. Solved in fp64; sorted first, so that order never matters."""
    ordered = sorted(associations, key=lambda a: a.edit)
    keys = torch.stack([a.key for a in ordered]).double()  # (n, D)
    directions = torch.stack([a.direction for a in ordered]).double()  # (n, D)
    values = torch.stack([a.value for a in ordered]).double()  # (n, d)
    gram = keys @ directions.T
    gram = (gram + gram.T) / 2
    own = gram.diagonal().clone()
    gram = gram + ridge * own.mean() * torch.eye(len(own), dtype=gram.dtype)
    names = {s: i for i, s in enumerate(dict.fromkeys(a.subject for a in ordered))}
    group = torch.tensor([names[a.subject] for a in ordered])
    same = (group[:, None] == group[None, :]).double()
    mixing = torch.linalg.solve(gram, (same * gram / own[:, None]).T).T  # D^-1 (M * G) G^-1
    return LowRank(values.T @ mixing, directions)


def compose(associations: Iterable[Association], ridge: float = RIDGE) -> dict[int, LowRank]:
    """The joint change of every layer that the associations touch."""
    by_layer = sorted(associations, key=lambda a: a.layer)
    return {layer: compose_layer(list(group), ridge) for layer, group in groupby(by_layer, lambda a: a.layer)}


def rebuild(base: Tensor, change: LowRank, conv1d: bool) -> Tensor:
    """The edited weight, from the untouched base bytes: fp64, then cast once to the weight's dtype.

    base: (D, d) when `conv1d`, else (d, D): decided by the architecture, never by comparing shapes.
    """
    delta = change.dense()
    return (base.double() + (delta.T if conv1d else delta).to(base.device)).to(base.dtype)


def norm_ratio(base: Tensor, change: LowRank) -> float:
    """|change| / |base| in Frobenius norm."""
    return float(change.dense().norm() / base.double().norm())


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
