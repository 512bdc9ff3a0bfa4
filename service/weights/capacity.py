"""How much of a layer is already spoken for.

The keys k_i of a layer's active associations, with directions u_i = C^-1 k_i, span a space in which a new change cannot be chosen
freely. Of a new key k the share that lies in it is that of its projection, orthogonal in the metric C^-1:

    spoken = g^T G^-1 g / (k^T C^-1 k)        g_i = u_i^T k        G_ij = k_i^T C^-1 k_j, plus a ridge        room = 1 - spoken

For keys drawn from the statistics, E[k k^T] = C, so that E[g g^T] = G and E[k^T C^-1 k] = D, the width: on average
tr(G (G + ridge)^-1) / D is spoken for, the number of keys that are really different over the number that there could be.

Keys are compared within one metric: AlphaEdit's directions are P k, those of all other forms C^-1 k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from service.kit.steps import Progress, Steps
from service.weights.composition import RIDGE, Association, Piece, gram_of


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


def rooms_steps(edits: Sequence[Sequence[Piece]], others: Iterable[Piece]) -> Steps[list[dict[int, float]]]:
    """Of each new edit, by layer, what active pieces leave of its key. Those of its own subject are left out: they share its key, and
    are meant to. A change of a whole weight has no key."""
    there = _by_metric(others)
    spoken = {place: _Spoken(known) for place, known in there.items()}
    found: list[dict[int, float]] = []
    for edit in edits:
        mine = _by_metric(edit).items()
        found.append({new.layer: spoken[x].left(new) if x in spoken else 1.0 for x, (new,) in mine})
        yield Progress("room", len(found), len(edits))
    return found


class _Spoken:
    """The keys of some associations of one layer and metric, and their gram matrix, for several new edits."""

    def __init__(self, known: Sequence[Association]) -> None:
        self.known, self.directions = known, torch.stack([a.direction for a in known])
        self.gram = gram_of(known, self.directions)

    def left(self, new: Association) -> float:
        """What is left of a new key by those of other subjects."""
        rows = [i for i, a in enumerate(self.known) if a.subject != new.subject]
        own = float(new.key.double() @ new.direction.double())
        return room(self.gram[rows][:, rows], gram_of([new], self.directions)[0, rows], own)


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
