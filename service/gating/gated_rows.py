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
2. One association that is open, at keys whose response is not limited, is ROME's rank-one update.
3. The associations of one subject that are open, at such keys, are the joint form of `composition.py`.
4. At the key of an association whose subject no other shares, the change is its delta, whatever the other rows are.
5. The change is a function of the set of associations. A revert removes its row.

The change is found in three stages, each of which leaves few pairs of a key and a row to the next:

1. One matrix product with the keys K of all rows of the process (`gate_table.py`), in fp32. Mostly nothing opens, and
   this is all.
2. The scores of the rows that came near and are active in the version of the token, in fp32.
3. The decision, for one key at a time in fp64 (`gated_row.py`).

The first two drop only pairs that are farther from a decision than their error. So the change at a position depends on
its key and its version alone, bit for bit: not on other rows of a batch, on their versions, on padding, or on what else
the table holds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from service.gating.gate_table import MARGIN, GateTable
from service.gating.gated_row import GatedRow, change_at, open_rows

MAX_PRODUCTS = 2**22  # of keys and rows that are in memory at a time


@dataclass(frozen=True, eq=False)
class GatedRows:
    """The gated associations of one layer and space that are active at a version, in the order of their edits' ids."""

    table: GateTable = field(repr=False)
    rows: tuple[GatedRow, ...] = field(repr=False)

    @property
    def layer(self) -> int:
        return self.table.space.layer

    @cached_property
    def active(self) -> frozenset[GatedRow]:
        return frozenset(self.rows)

    @property
    def nbytes(self) -> int:
        """The memory of the rows, which other versions may share."""
        return sum(row.nbytes for row in self.rows)

    def changed(self, removed: Collection[str], added: Sequence[GatedRow]) -> GatedRows:
        """Return the rows without those of some edits, and with other ones."""
        rows = list(self.rows)
        for edit in removed:
            at = bisect_left(rows, edit, key=_edit_of)
            while at < len(rows) and rows[at].edit == edit:
                del rows[at]
        for row in added:
            insort(rows, row, key=_edit_of)
        return GatedRows(self.table, tuple(rows))

    def digests(self) -> Tensor:
        """Return the digests of the rows in their order, (n, 32) bytes."""
        content = bytearray(b"".join([row.digest for row in self.rows]))
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, 32)

    def change(self, keys: Tensor) -> TokenChanges | None:
        """Return the changes at keys (T, D); None if nothing opens."""
        return change_of_batch(keys, [self])

    def open_subjects(self, keys: Tensor) -> list[tuple[int, str]]:
        """Return the positions of keys (T, D) at which something opens, with the subject of what opens."""
        opened: list[tuple[int, str]] = []
        for token, rows in _rows_near(self.table, keys, [self] * len(keys)):
            _, q = self.table.project_precisely(keys[token])
            if acting := open_rows(q, rows):
                opened.append((token, acting[0].subject))
        return opened


@dataclass(frozen=True)
class TokenChanges:
    """The tokens of a batch at which something opens."""

    tokens: Tensor  #: their positions (n,), each once
    changes: Tensor  #: of the outputs there, (n, d) in fp32


def new_gated_rows(table: GateTable, rows: Sequence[GatedRow]) -> GatedRows:
    """Return the rows of a version, in any order."""
    return GatedRows(table, tuple(sorted(rows, key=_edit_of)))


def _edit_of(row: GatedRow) -> str:
    return row.association.edit


def change_of_batch(keys: Tensor, versions: Sequence[GatedRows | None]) -> TokenChanges | None:
    """Return the changes at the keys (B n, D) of B sequences with n tokens each, one after the other, of which each is
    at a version of its own; None stands for one without rows. All have one table. Return None if nothing opens."""
    (table,) = {id(v.table): v.table for v in versions if v is not None}.values()
    length, rest = divmod(len(keys), len(versions))
    if rest:
        raise ValueError(f"{len(keys)} keys are not those of {len(versions)} sequences of one length")
    tokens: list[int] = []
    changes: list[Tensor] = []
    step = max(1, MAX_PRODUCTS // max(1, table.slots))
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        of_tokens = [versions[(start + i) // length] for i in range(len(part))]
        for token, rows in _rows_near(table, part, of_tokens):
            key, q = table.project_precisely(part[token])
            if (change := change_at(key, q, rows)) is not None:
                tokens.append(start + token)
                changes.append(change.float())
    if not tokens:
        return None
    return TokenChanges(torch.tensor(tokens, device=keys.device), torch.stack(changes).to(keys.device))


def _rows_near(
    table: GateTable, keys: Tensor, versions: Sequence[GatedRows | None]
) -> Iterator[tuple[int, list[GatedRow]]]:
    """Yield the tokens at which something may open, with the rows that can matter there, in the order of their edits'
    ids. `versions` are those of the tokens."""
    q = table.project(keys)
    if (near := table.near_rows(q)) is None:
        return
    tokens, token_of_pair = near[0].unique(return_inverse=True)
    numbers, row_of_pair = near[1].unique(return_inverse=True)
    pairs = torch.zeros(len(tokens), len(numbers), dtype=torch.bool)
    pairs[token_of_pair, row_of_pair] = True
    found = [(table.numbered(number), i) for i, number in enumerate(numbers.tolist())]
    held = sorted(((row, i) for row, i in found if row is not None), key=lambda pair: pair[0].edit)
    rows = [row for row, _ in held]
    pairs = pairs[:, [i for _, i in held]] & _activity(rows, [versions[t] for t in tokens.tolist()])
    some = pairs.any(1)
    if not some.any():
        return
    tokens, pairs = tokens[some], pairs[some]
    matter = _mattering(q[tokens.to(q.device)].cpu(), rows, pairs)
    for token, row_is_near in zip(tokens.tolist(), matter, strict=True):
        yield token, [rows[i] for i in row_is_near.nonzero()[:, 0].tolist()]


def _activity(rows: Sequence[GatedRow], versions: Sequence[GatedRows | None]) -> Tensor:
    """Return whether each row is active at each version, (T, n)."""
    by_version = {id(v): v for v in versions}
    active = {
        key: torch.tensor([v is not None and row in v.active for row in rows], dtype=torch.bool)
        for key, v in by_version.items()
    }
    return torch.stack([active[id(v)] for v in versions])


def _mattering(q: Tensor, rows: Sequence[GatedRow], pairs: Tensor) -> Tensor:
    """Return which of the pairs (T, n) of q (T, r) and rows can matter: those of subjects that may be the nearest, with
    a score that may be above 0."""
    scores = _scores(q, rows).masked_fill(~pairs, -torch.inf)
    positive = scores > -MARGIN
    nearest = positive & (scores >= scores.amax(1, keepdim=True) - 2 * MARGIN)
    number_of_subject: dict[str, int] = {}
    subjects = torch.tensor([number_of_subject.setdefault(r.subject, len(number_of_subject)) for r in rows])
    subject_counts = torch.zeros(len(q), len(number_of_subject)).index_add_(1, subjects, nearest.float())
    return positive & (subject_counts > 0)[:, subjects]


def _scores(q: Tensor, rows: Sequence[GatedRow]) -> Tensor:
    """Return the scores of rows at q (T, r), (T, n) in fp32."""
    own = _largest_products(q, [row.gate.keys for row in rows])
    blocked = _largest_products(q, [row.gate.blocked for row in rows])
    return own - torch.maximum(blocked, torch.tensor([row.gate.threshold for row in rows]))


def _largest_products(q: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Return the largest product of each of q (T, r) with the keys (m, r) of each group, (T, n); -2 for an empty
    group."""
    products = q @ torch.cat(list(groups)).T
    owners = torch.tensor([i for i, keys in enumerate(groups) for _ in range(len(keys))], dtype=torch.long)
    largest = torch.full((len(q), len(groups)), -2.0)
    return largest.scatter_reduce(1, owners.expand(len(q), -1), products, "amax")
