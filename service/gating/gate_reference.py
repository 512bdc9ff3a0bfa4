"""Keys at which the gate of an edit must stay closed: those of unrelated text, and those of other subjects.

They are a function of the base model, its corpus and its table of facts, not of other edits, so that a gate depends on
its own edit alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

import torch
from torch import Tensor

from service.covariance.collect import batch_by_length, unpadded_keys
from service.covariance.second_moment import KeyStatistics
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import mentions, normalize_whitespace
from service.methods.gate_sizes import MAX_BLOCKED, MAX_KEYS
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.weights.factors import Gate
from service.weights.gate_space import GateSpace, build_gate_space

REFERENCE_TEXTS = 100  # of the corpus
TEXT_TOKENS = 64  # of each
BLOCK_MARGIN = 0.1  # keys whose cosine is this much below the threshold, or less, are blocked, too


@dataclass(frozen=True)
class GateReport:
    """How well a gate distinguishes its subject from others; whitened cosines."""

    threshold: float
    agreement: float  #: the least cosine of one of its keys with the nearest other one of them
    nearest: float  #: the largest cosine with a reference key of another subject
    nearest_source: str  #: the name of that subject, or the text that the key is from

    @property
    def is_apart(self) -> bool:
        """Whether the keys agree more with each other than with another subject, and open the gate by themselves."""
        return self.agreement > max(self.threshold, self.nearest)


@dataclass(frozen=True)
class GateReference:
    """The reference keys of one layer."""

    space: GateSpace
    keys: Tensor = field(repr=False)  #: q (N, r)
    sources: list[str] = field(
        repr=False
    )  #: of each key: the text that it is from, or the name of its subject
    text_keys: int  #: number of the keys from texts, which come first

    def build_gate(self, keys: Tensor, subject: str, threshold: float) -> Gate:
        """Return the gate of an edit from the keys (m, D) of its subject, the first of which is that of the bare
        prompt. The reference keys that come near are blocked, the nearest ones first, except those of the subject
        itself."""
        own = most_different(self.space.project(keys.cpu()), MAX_KEYS)
        near = takewhile(
            lambda other: other[1] > threshold - BLOCK_MARGIN, self._nearest_others(own, subject)
        )
        blocked = [number for number, _ in islice(near, MAX_BLOCKED)]
        return Gate(self.space, own, self.keys[blocked], threshold)

    def describe(self, gate: Gate, subject: str) -> GateReport:
        """Return how well a gate distinguishes its subject."""
        number, similarity = next(self._nearest_others(gate.keys, subject), (None, 0.0))
        source = "" if number is None else self.sources[number]
        return GateReport(gate.threshold, _agreement(gate.keys), similarity, source)

    def _nearest_others(self, keys: Tensor, subject: str) -> Iterator[tuple[int, float]]:
        """Yield the reference keys that are not about a subject, by their largest cosine with keys (m, r): the number
        and the cosine, the nearest first."""
        similarity, order = (self.keys @ keys.T).amax(1).sort(descending=True, stable=True)
        for cosine, number in zip(similarity.tolist(), order.tolist(), strict=True):
            if not self._is_about(number, subject):
                yield number, cosine

    def _is_about(self, number: int, subject: str) -> bool:
        source = normalize_whitespace(self.sources[number])
        return mentions(source, subject) if number < self.text_keys else fold(source) == fold(subject)


def _agreement(keys: Tensor) -> float:
    """Return the least cosine of a key (m, r) with the nearest other one; 1 for a single key."""
    if len(keys) < 2:
        return 1.0
    cosines = keys @ keys.T
    cosines.fill_diagonal_(-1)
    return float(cosines.amax(1).min())


def most_different(keys: Tensor, count: int) -> Tensor:
    """Return at most `count` of the keys (m, r): the first one, then again and again the one that is farthest from
    those that are chosen. Keys after many contexts are nearly the same."""
    chosen = [0]
    nearest = keys @ keys[0]
    while len(chosen) < min(count, len(keys)):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, keys @ keys[chosen[-1]])
    return keys[chosen]


def fold(name: str) -> str:
    """Return a name without regard to capitals and white space."""
    return normalize_whitespace(name).casefold()


def collect_gate_reference(
    model: LoadedModel, statistics: KeyStatistics, texts: Sequence[str], subjects: Sequence[str]
) -> Stepper[GateReference]:
    """Return the reference of a layer: the keys of every token of the first texts, and those of the last token of
    every subject."""
    space = build_gate_space(statistics)
    rows = [model.encode(text)[0][:TEXT_TOKENS] for text in texts[:REFERENCE_TEXTS]]
    names = [model.encode(name)[0] for name in subjects]
    keys: list[Tensor] = []
    sources: list[str] = []
    total = len(rows) + len(names)
    for number, (ids, source) in enumerate(zip(rows, texts, strict=False)):
        row_keys = yield from keys_of_rows(model, space.layer, [ids], Progress(Phase.PREPARE, number, total))
        keys.append(space.project(row_keys))
        sources += [source] * len(row_keys)
    text_keys, done = len(sources), len(rows)
    for batch in batch_by_length(names):
        captured = yield from keys_of_rows(model, space.layer, batch, Progress(Phase.PREPARE, done, total))
        ends = torch.tensor([len(ids) for ids in batch]).cumsum(0) - 1
        keys.append(space.project(captured[ends]))
        sources += [model.decode(ids) for ids in batch]
        done += len(batch)
    return GateReference(space, torch.cat(keys), sources, text_keys)


def keys_of_rows(
    model: LoadedModel, layer: int, rows: list[list[int]], progress: Progress
) -> Stepper[Tensor]:
    """Return the keys of all tokens of some rows, row by row, (N, D)."""
    batch = pad(rows, model)
    with capture({0: model.down_proj(layer)}, "input") as captured, stop_after(model.down_proj(layer)):
        forward(model, batch)
    yield progress
    return unpadded_keys(captured[0], batch).cpu()
