"""Gated associations: the changes of value of active edits, looked up by key and not solved into the weights.

For associations i with subject s_i, keys k_i, threshold tau_i, direction w_i and change of value delta_i, at a key k:

    score_i(k) = max over the keys of i of rho(k, k_i) - tau_i
    near(k)    = argmax_i score_i(k)                                       the first one among equals
    S(k)       = { i : s_i = s_near and score_i(k) > 0 }
    out(k)     = W0 k + b + sum_{i in S(k)} g_i(k) delta_i                 if score_near(k) > 0, else W0 k + b
    g_i(k)     = clamp(w_i^T k, 0, 1)        w_i = C^-1 k_i / (k_i^T C^-1 k_i)

rho is the cosine in the layer's gate space. g is the response of ROME's rank-one update (Meng et al. 2022, Eq. 2),
limited to the full change. The associations of one subject act together, because two facts of a subject have nearly
one key; NeuralDB (ICLR 2026) is the nearest published form and has no groups. Identities, each with a test:

1. With nothing open the output is that of the base, byte for byte.
2. One association, forced open and not limited, is ROME's rank-one update at every key.
3. The associations of one subject, forced open and not limited, are the joint form of `composition.py`.
4. At the key of an association whose subject no other shares, the change is its delta, whatever the other rows are.
5. The change is a function of the set of associations. A revert removes its row.

The decision at a position depends on its key alone: not on other rows of a batch, on padding, or on a rebuilt cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.gating.gate_space import GateSpace
from service.weights.factors import Association, Gate


@dataclass(frozen=True)
class GatedRows:
    """The active gated associations of one layer, as tensors. n associations have m keys together."""

    space: GateSpace
    keys: Tensor = field(repr=False)  #: q of every key, (m, r)
    owners: Tensor = field(repr=False)  #: association of every key, (m,)
    thresholds: Tensor = field(repr=False)  #: of every key, (m,)
    subjects: Tensor = field(repr=False)  #: number of the subject of every association, (n,)
    directions: Tensor = field(repr=False)  #: w (n, D)
    values: Tensor = field(repr=False)  #: delta (n, d)

    @property
    def layer(self) -> int:
        return self.space.layer

    @property
    def size(self) -> int:
        """The number of associations."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that determines the output, by name."""
        names = ("keys", "owners", "thresholds", "subjects", "directions", "values")
        return {"sketch": self.space.sketch} | {name: getattr(self, name) for name in names}

    def scores(self, keys: Tensor) -> Tensor:
        """Return the score of every association's keys at keys (T, D): rho - tau, (T, m)."""
        return self.space.project(keys) @ self.keys.T - self.thresholds

    def change(self, keys: Tensor, limited: bool = True, forced: bool = False) -> Tensor | None:
        """Return the change of the output at keys (T, D), (T, d) in fp32; None if nothing opens.

        `limited=False` does not limit the response to [0, 1], and `forced` opens every association of the nearest
        subject at every key: for the identities.
        """
        scores = self.scores(keys)
        best, nearest = scores.max(1)
        tokens = (torch.ones_like(best, dtype=torch.bool) if forced else best > 0).nonzero()[:, 0]
        if len(tokens) == 0:
            return None
        subject = self.subjects[self.owners[nearest[tokens]]]
        acts = subject[:, None] == self.subjects[None, :]  # (tokens, n)
        if not forced:
            open_keys = (scores[tokens] > 0).float()
            acts &= torch.zeros(acts.shape, device=acts.device).index_add_(1, self.owners, open_keys) > 0
        token, association = acts.nonzero(as_tuple=True)
        response = (self.directions[association] * keys[tokens[token]].float()).sum(1)
        if limited:
            response = response.clamp(0, 1)
        change = self.values.new_zeros(len(keys), self.values.shape[1])
        return change.index_add(0, tokens[token], response[:, None] * self.values[association])


def build_gated_rows(space: GateSpace, associations: Sequence[Association]) -> GatedRows:
    """Return the rows of one layer for its active gated associations, in the order of their edits' ids."""
    ordered = sorted(associations, key=lambda a: a.edit)
    gates = [_gate_in(space, a) for a in ordered]
    number_of_subject = {subject: i for i, subject in enumerate(sorted({a.subject for a in ordered}))}
    owners = [i for i, gate in enumerate(gates) for _ in gate.keys]
    return GatedRows(
        space,
        torch.cat([gate.keys for gate in gates]),
        torch.tensor(owners),
        torch.tensor([gates[i].threshold for i in owners]),
        torch.tensor([number_of_subject[a.subject] for a in ordered]),
        torch.stack([a.response_direction() for a in ordered]),
        torch.stack([a.value.float() for a in ordered]),
    )


def _gate_in(space: GateSpace, association: Association) -> Gate:
    """Return the gate of an association. Raise ValueError if it is not of this space."""
    if association.gate is None or association.gate.space != space.digest:
        raise ValueError(f"the association of edit {association.edit} has no gate in this space")
    return association.gate
