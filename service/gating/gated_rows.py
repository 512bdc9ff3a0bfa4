"""Gated associations: the changes of value of active edits, looked up by key and not solved into the weights.

For associations i with subject s_i, keys K_i, blocked keys B_i, threshold tau_i, direction w_i and change of value
delta_i, at a key k:

    score_i(k) = max_{l in K_i} rho(k, l) - max(tau_i, max_{l in B_i} rho(k, l))
    near(k)    = argmax_i score_i(k)                                       the first one among equals
    S(k)       = { i : s_i = s_near and score_i(k) > 0 }
    out(k)     = W0 k + b + sum_{i in S(k)} g_i(k) delta_i                 if score_near(k) > 0, else W0 k + b
    g_i(k)     = clamp(w_i^T k, 0, 1)        w_i = C^-1 k_i / (k_i^T C^-1 k_i)

rho is the cosine in the layer's gate space. g is the response of ROME's rank-one update (Meng et al. 2022, Eq. 2),
limited to the full change. The associations of one subject act together, because two facts of a subject have nearly
one key; NeuralDB (ICLR 2026) is the nearest published form and has neither groups nor blocked keys. The blocked keys
are those of other subjects that come near: a key opens an association if it is nearer to it than to them. Identities,
each with a test:

1. With nothing open the output is that of the base, byte for byte.
2. One association, forced open and not limited, is ROME's rank-one update at every key.
3. The associations of one subject, forced open and not limited, are the joint form of `composition.py`.
4. At the key of an association whose subject no other shares, the change is its delta, whatever the other rows are.
5. The change is a function of the set of associations. A revert removes its row.

The decision at a position depends on its key alone: not on other rows of a batch, on padding, or on a rebuilt cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from service.weights.factors import Association
from service.weights.gate_space import GateSpace


@dataclass(frozen=True)
class GatedRows:
    """The n active gated associations of one layer, as tensors."""

    space: GateSpace
    keys: Tensor = field(
        repr=False
    )  #: K (n, m, r); the first key of an association with fewer than m is repeated
    blocked: Tensor = field(repr=False)  #: B (n, b, r)
    is_blocked: Tensor = field(
        repr=False
    )  #: (n, b); False where an association has fewer than b blocked keys
    thresholds: Tensor = field(repr=False)  #: tau (n,)
    subjects: Tensor = field(repr=False)  #: number of the subject (n,)
    directions: Tensor = field(repr=False)  #: w (n, D)
    values: Tensor = field(repr=False)  #: delta (n, d)

    @property
    def layer(self) -> int:
        return self.space.layer

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that determines the output, by name."""
        return {"sketch": self.space.sketch} | {
            f.name: getattr(self, f.name) for f in fields(self) if f.name != "space"
        }

    def to(self, device: torch.device) -> GatedRows:
        """Return the rows on a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "space"}
        return GatedRows(GateSpace(self.layer, self.space.sketch.to(device)), **moved)

    def scores(self, keys: Tensor) -> Tensor:
        """Return the score of every association at keys (T, D), (T, n)."""
        q = self.space.project(keys)
        own = _largest_products(q, self.keys)
        limits = self.thresholds.expand_as(own)
        if self.blocked.shape[1]:
            products = torch.einsum("tr,nbr->tnb", q, self.blocked).masked_fill(~self.is_blocked, -2.0)
            limits = torch.maximum(limits, products.amax(2))
        return own - limits

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
        acts = self.subjects[nearest[tokens]][:, None] == self.subjects[None, :]  # (tokens, n)
        if not forced:
            acts &= scores[tokens] > 0
        token, association = acts.nonzero(as_tuple=True)
        response = (self.directions[association] * keys[tokens[token]].float()).sum(1)
        if limited:
            response = response.clamp(0, 1)
        change = self.values.new_zeros(len(keys), self.values.shape[1])
        return change.index_add(0, tokens[token], response[:, None] * self.values[association])


def _largest_products(q: Tensor, keys: Tensor) -> Tensor:
    """Return the largest product of each row of q (T, r) with the keys (n, m, r) of each association, (T, n)."""
    products = q @ keys.flatten(0, 1).T
    largest: Tensor = products.unflatten(1, keys.shape[:2]).amax(2)
    return largest


def build_gated_rows(associations: Sequence[Association]) -> GatedRows:
    """Return the rows of the active gated associations of one layer and space, in the order of their edits' ids."""
    ordered = sorted(associations, key=lambda a: a.edit)
    gates = [gate for a in ordered if (gate := a.gate) is not None]
    if len({gate.space.digest for gate in gates}) != 1 or len(gates) != len(ordered):
        raise ValueError("gated rows need associations whose gates are in one space")
    number_of_subject = {subject: i for i, subject in enumerate(sorted({a.subject for a in ordered}))}
    most_keys = max(len(gate.keys) for gate in gates)
    most_blocked = max(len(gate.blocked) for gate in gates)
    return GatedRows(
        gates[0].space,
        torch.stack([_padded(gate.keys, most_keys) for gate in gates]),
        torch.stack([_padded(gate.blocked, most_blocked) for gate in gates]),
        torch.stack([torch.arange(most_blocked) < len(gate.blocked) for gate in gates]),
        torch.tensor([gate.threshold for gate in gates]),
        torch.tensor([number_of_subject[a.subject] for a in ordered]),
        torch.stack([a.response_direction() for a in ordered]),
        torch.stack([a.value.float() for a in ordered]),
    )


def _padded(keys: Tensor, count: int) -> Tensor:
    """Return `count` keys: these, then the first of them again; zeros where there is none."""
    first = keys[:1] if len(keys) else keys.new_zeros(1, keys.shape[1])
    return torch.cat([keys, first.expand(count - len(keys), -1)])
