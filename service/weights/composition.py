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

from service.models.loading import Site
from service.models.memory_estimates import CUT
from service.models.precision import double_device

RIDGE = 1e-3  # eps, as a multiple of the mean of D, where a recipe says nothing else


@dataclass(frozen=True, order=True)
class Form:
    """How associations of one layer are solved together."""

    name: str = "joint"
    ridge: float = RIDGE  #: joint: a multiple of the mean of D; the others: itself

    def ridge_of(self, own: Tensor) -> float:
        """What is added to the gram matrix's diagonal `own` (n,)."""
        if self.name == "joint":
            return self.ridge * float(own.mean())
        return 0.0 if self.name == "emmet" and len(own) == 1 else self.ridge


JOINT = Form()


@dataclass(frozen=True)
class Association:
    """One key and the change of value it shall bring about at one layer, found on the base model."""

    edit: str  #: id of the edit; the canonical order
    subject: str
    layer: int
    key: Tensor = field(repr=False)  #: k (D,)
    direction: Tensor = field(repr=False)  #: C^-1 k (D,); AlphaEdit: P k
    value: Tensor = field(repr=False)  #: delta (d,): the change of the down-projection's output at k
    form: Form = JOINT

    @property
    def site(self) -> Site:
        return Site(self.layer)

    def scaled(self, strength: float) -> Association:
        return replace(self, value=self.value * strength)

    def rank_one(self) -> LowRank:
        """What it comes to alone: ROME's own update delta (C^-1 k)^T / (k^T C^-1 k), less where its form has a ridge."""
        key, direction = self.key.double(), self.direction.double()
        own = (key @ direction)[None]
        if self.form.name != "joint":
            own = own + self.form.ridge_of(own)
        return LowRank((self.value.double() / own)[:, None], direction[None, :])


@dataclass(frozen=True)
class Addend:
    """A change of a whole weight, as training makes it: not an association at one key."""

    edit: str
    subject: str
    site: Site
    change: Tensor = field(repr=False)  #: (out, in)

    @property
    def layer(self) -> int:
        return self.site.layer

    def scaled(self, strength: float) -> Addend:
        return replace(self, change=self.change * strength)


Piece = Association | Addend


@dataclass(frozen=True)
class LowRank:
    """A change of a weight, left @ right: left (d, n) in fp64; right (n, D), which is widened to fp64 where it is used."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    edits: tuple[str, ...] = ()  #: where known, the edit behind each of the n terms

    def cut(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Some columns at a time: which, and the change (d, c) of these in fp64 on a device."""
        left = self.left.to(device)
        for at in _columns(self.right):
            yield at, left @ self.right[:, at].to(device).double()

    def dense(self) -> Tensor:
        """(d, D)."""
        return torch.cat([change for _, change in self.cut()], 1)

    def norm(self) -> float:
        """The Frobenius norm. Of few terms by R of right^T = Q R, since |left right| = |left R^T|; else of all columns.

        The gram matrices of both factors would give it, too, but lose half of the digits where terms cancel.
        """
        if 2 * self.left.shape[1] < self.left.shape[0]:
            return float((self.left @ torch.linalg.qr(self.right.double().T, mode="r").R.T).norm())
        return math.hypot(*(float(change.norm()) for _, change in self.cut()))

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


def compose_layer(associations: Sequence[Association], form: Form | None = None) -> LowRank:
    """The change for associations of one form and layer. Solved in fp64; sorted first, so that order never matters."""
    ordered = sorted(associations, key=lambda a: a.edit)
    form = form or ordered[0].form
    directions = torch.stack([a.direction for a in ordered])  # (n, D)
    values = torch.stack([a.value for a in ordered], 1).double()  # (d, n)
    gram = gram_of(ordered, directions)
    own = gram.diagonal().clone()
    gram.diagonal().add_(form.ridge_of(own))
    wanted = _superposed(ordered, values, gram, own) if form.name == "joint" else values
    with one_thread():
        left = torch.linalg.solve(gram, wanted.T).T
    return LowRank(left, directions, tuple(a.edit for a in ordered))


def gram_of(associations: Sequence[Association], directions: Tensor) -> Tensor:
    """Of key i and direction j, (n, m), in fp64; directions (m, D)."""
    keys = torch.stack([a.key for a in associations])  # (n, D)
    gram = torch.zeros(len(keys), len(directions), dtype=torch.float64)
    for at in _columns(keys):
        gram.addmm_(keys[:, at].double(), directions[:, at].double().T)
    return gram


def _superposed(ordered: Sequence[Association], values: Tensor, gram: Tensor, own: Tensor) -> Tensor:
    """What shall happen at each key: Delta D^-1 (M * G), (d, n)."""
    wanted = values * (gram.diagonal() / own)
    for rows in _subjects(ordered):
        if len(rows) > 1:
            wanted[:, rows] = values[:, rows] @ (gram[rows][:, rows].T / own[rows, None])
    return wanted


@contextmanager
def one_thread() -> Iterator[None]:
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


@dataclass(frozen=True)
class Change:
    """What a version changes in one weight: what its associations were solved to, and the sum of its addends."""

    solved: tuple[LowRank, ...] = ()  #: of each form
    added: Tensor | None = field(default=None, repr=False)  #: (out, in), fp64

    def cut(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Some columns at a time: which, and the change (out, n) of these in fp64 on a device; the caller's own to write into."""
        parts = [low.cut(device) for low in self.solved]
        if self.added is not None:
            parts.append(self._whole(device))
        for pieces in zip(*parts, strict=True):
            total = pieces[0][1]
            for _, more in pieces[1:]:
                total += more
            yield pieces[0][0], total

    def _whole(self, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
        assert self.added is not None
        for at in _columns(self.added):
            yield at, self.added[:, at].to(device, copy=True)

    def dense(self) -> Tensor:
        """(out, in)."""
        return torch.cat([change for _, change in self.cut()], 1)

    def norm(self) -> float:
        """The Frobenius norm."""
        if len(self.solved) == 1 and self.added is None:
            return self.solved[0].norm()
        return math.hypot(*(float(change.norm()) for _, change in self.cut()))

    def minus(self, other: Change) -> Change:
        """The difference of two changes of one weight."""
        if len(self.solved) == len(other.solved) == 1 and self.added is None and other.added is None:
            return Change((self.solved[0].minus(other.solved[0]),))
        negative = tuple(replace(low, left=-low.left) for low in other.solved)
        mine, theirs = self.added, other.added
        added = mine if theirs is None else -theirs if mine is None else mine - theirs
        return Change((*self.solved, *negative), added)


def compose(pieces: Iterable[Piece]) -> dict[Site, Change]:
    """The change of every weight that the pieces touch."""
    ordered = sorted(pieces, key=lambda p: (p.site, p.edit))
    return {site: _compose_site(list(group)) for site, group in groupby(ordered, lambda p: p.site)}


def _compose_site(pieces: Sequence[Piece]) -> Change:
    by_form: dict[Form, list[Association]] = {}
    added: Tensor | None = None
    for piece in pieces:
        if isinstance(piece, Association):
            by_form.setdefault(piece.form, []).append(piece)
        else:
            more = piece.change.double()
            added = more if added is None else added + more
    return Change(tuple(compose_layer(by_form[form]) for form in sorted(by_form)), added)


def rebuild(base: Tensor, change: Change | LowRank, conv1d: bool) -> Tensor:
    """The edited weight, from the untouched base bytes: fp64 on its own device, then cast once to its dtype.

    base: (in, out) when `conv1d`, else (out, in): decided by the architecture, never by comparing shapes.
    """
    exact = double_device(base.device)
    edited = torch.empty_like(base)
    for at, more in change.cut(exact):
        if conv1d:
            edited[at] = more.T.add_(base[at].to(exact)).to(base.dtype)
        else:
            edited[:, at] = more.add_(base[:, at].to(exact)).to(base.dtype)
    return edited


def norm_ratio(base: Tensor, change: Change | LowRank) -> float:
    """|change| / |base| in Frobenius norm."""
    return change.norm() / float(torch.linalg.vector_norm(base, dtype=torch.float64))


def pack(pieces: Sequence[Piece]) -> bytes:
    """Safetensors. Of an association: key, direction and value, and the rank-one factors as applied alone; its form where it is
    not the joint one. Of an addend: the change of its weight."""
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        parts = _association_parts(piece) if isinstance(piece, Association) else _addend_parts(piece)
        tensors |= {name: t.contiguous().cpu() for name, t in parts.items()}
    return save(tensors)


def _association_parts(a: Association) -> dict[str, Tensor]:
    factors, place = a.rank_one(), f"layer.{a.layer}"
    parts = {
        f"{place}.key": a.key.float(),
        f"{place}.direction": a.direction.float(),
        f"{place}.value": a.value.float(),
        f"{place}.left": factors.left[:, 0].float(),
        f"{place}.right": factors.right[0].float(),
    }
    if a.form != JOINT:
        parts[f"{place}.form.{a.form.name}"] = torch.tensor([a.form.ridge], dtype=torch.float64)
    return parts


def _addend_parts(a: Addend) -> dict[str, Tensor]:
    return {f"weight.{a.site.layer}.{a.site.part}": a.change.float()}


def unpack(data: bytes, edit: str, subject: str) -> list[Piece]:
    """The pieces of one edit from `pack`'s bytes."""
    tensors = load(data)
    names = [name.split(".") for name in sorted(tensors)]
    forms = {
        int(words[1]): Form(words[3], float(tensors[".".join(words)]))
        for words in names
        if words[2] == "form"
    }
    layers = sorted({int(words[1]) for words in names if words[0] == "layer"})
    associations: list[Piece] = [
        Association(
            edit,
            subject,
            x,
            tensors[f"layer.{x}.key"],
            tensors[f"layer.{x}.direction"],
            tensors[f"layer.{x}.value"],
            forms.get(x, JOINT),
        )
        for x in layers
    ]
    whole = [Site(int(words[1]), words[2]) for words in names if words[0] == "weight"]
    return associations + [
        Addend(edit, subject, s, tensors[f"weight.{s.layer}.{s.part}"]) for s in sorted(whole)
    ]
