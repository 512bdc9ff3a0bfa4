"""How much of a layer is already spoken for.

The keys k_i of a layer's active associations, with directions u_i = C^-1 k_i, span a space in which a new change cannot be chosen
freely. Of a new key k the share that lies in it is that of its projection, orthogonal in the metric C^-1:

    spoken = g^T G^-1 g / (k^T C^-1 k)        g_i = u_i^T k        G_ij = k_i^T C^-1 k_j, plus a ridge        room = 1 - spoken

For keys drawn from the statistics, E[k k^T] = C, so that E[g g^T] = G and E[k^T C^-1 k] = D, the width: on average
tr(G (G + ridge)^-1) / D is spoken for, the number of keys that are really different over the number that there could be.

Keys are compared within one metric: AlphaEdit's directions are P k, those of all other forms C^-1 k.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from service.editors.composition import RIDGE, Association, Piece, gram_of


def room(gram: Tensor, overlap: Tensor, own: float, ridge: float = RIDGE) -> float:
    """What is left of a key: gram (n, n) of the keys that are there, their overlap (n,) with it, and its own u^T k.

    `ridge` is a multiple of the gram matrix's mean diagonal entry.
    """
    if not len(overlap):
        return 1.0
    spoken = float(overlap @ torch.linalg.solve(_ridged(gram, ridge), overlap)) / own
    return min(1.0, max(0.0, 1 - spoken))


def average_room(gram: Tensor, width: int, ridge: float = RIDGE) -> float:
    """What is left of a key drawn from the statistics, on average; keys are `width` long."""
    spoken = float(torch.linalg.solve(_ridged(gram, ridge), gram).trace()) / width
    return min(1.0, max(0.0, 1 - spoken))


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def rooms(mine: Iterable[Piece], others: Iterable[Piece]) -> dict[int, float]:
    """By layer, what active pieces leave of the keys of a new edit. Those of its own subject are left out: they share its key, and
    are meant to. A change of a whole weight has no key."""
    there = _by_metric(others)
    found = {}
    for place, (new,) in _by_metric(mine).items():
        known = [a for a in there.get(place, ()) if a.subject != new.subject]
        left = 1.0
        if known:
            directions = torch.stack([a.direction for a in known])
            own = float(new.key.double() @ new.direction.double())
            left = room(gram_of(known, directions), gram_of([new], directions)[0], own)
        found[new.layer] = left
    return found


def average_rooms(pieces: Iterable[Piece]) -> dict[int, float]:
    """By layer, what pieces leave of an average key; where two metrics are in use, the less."""
    found: dict[int, float] = {}
    for (layer, _), known in _by_metric(pieces).items():
        gram = gram_of(known, torch.stack([a.direction for a in known]))
        found[layer] = min(average_room(gram, len(known[0].key)), found.get(layer, 1.0))
    return found


def _by_metric(pieces: Iterable[Piece]) -> dict[tuple[int, bool], list[Association]]:
    """The associations of one layer and one metric."""
    found: dict[tuple[int, bool], list[Association]] = {}
    for p in pieces:
        if isinstance(p, Association):
            found.setdefault((p.layer, p.form.name == "alphaedit"), []).append(p)
    return found
