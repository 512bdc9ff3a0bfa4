"""The figures of a scope classifier on a part that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper
from service.training.scope_examples import (
    OUTSIDE_KINDS,
    MeasuredPair,
    ScopePart,
    measured_pairs,
)
from service.training.scope_loss import share_open
from service.weights.scope_classifier import ScopeClassifier

TEXTS_PER_STEP = 64
ReadFeatures = Callable[[Sequence[str]], Tensor]  #: texts -> their features (n, d)


@dataclass(frozen=True)
class ScopeMeasurement:
    """The similarity of the pairs of a part, and of each text to all of its facts."""

    pairs: list[MeasuredPair] = field(repr=False)
    similarities: Tensor = field(repr=False)  #: phi (n,) of the pairs
    to_all: Tensor = field(repr=False)  #: phi (n, m) of the text of each pair and each fact
    named: Tensor = field(repr=False)  #: whether the text of a pair contains the subject of a fact (n, m)

    @property
    def within(self) -> Tensor:
        return torch.tensor([p.kind is None for p in self.pairs], dtype=torch.bool)

    @property
    def names_subject(self) -> Tensor:
        return torch.tensor([p.names_subject for p in self.pairs], dtype=torch.bool)

    def figures(self, classifier: ScopeClassifier) -> dict[str, Any]:
        """Return the figures at the thresholds of a classifier, for any prompt and for those with the subject."""
        without = self._figures(classifier.threshold, torch.ones_like(self.named))
        return {
            "any_prompt": without,
            "with_subject": self._figures(classifier.subject_threshold, self.named),
        }

    def _figures(self, threshold: float, allowed: Tensor) -> dict[str, Any]:
        """Return the shares of pairs that open, and what a memory of all facts opens. A record opens only for the texts
        that are `allowed` (n, m)."""
        facts = torch.tensor([p.fact for p in self.pairs], dtype=torch.long)
        own_allowed = allowed.gather(1, facts[:, None])[:, 0]
        alone = self.similarities.masked_fill(~own_allowed, -1.0)
        kinds = {kind: [p.kind == kind for p in self.pairs] for kind in (None, *OUTSIDE_KINDS)}
        chosen = {kind: torch.tensor(flags, dtype=torch.bool) for kind, flags in kinds.items()}
        best, nearest = self.to_all.masked_fill(~allowed, -1.0).max(1)
        opened, within = best >= threshold, chosen[None]
        return {
            "pairs": {kind or "within": int(flags.sum()) for kind, flags in chosen.items()},
            "within_open": share_open(alone[within], threshold),
            "outside_open": {kind: share_open(alone[chosen[kind]], threshold) for kind in OUTSIDE_KINDS},
            "memory": {
                "records": self.to_all.shape[1],
                "right": _mean(opened & (nearest == facts), within),
                "wrong": _mean(opened & (nearest != facts), within),
            },
        }


def measure_scope(
    classifier: ScopeClassifier, read: ReadFeatures, part: ScopePart, seen: Iterable[str], seed: int
) -> Stepper[ScopeMeasurement]:
    """Return the similarities of a part. `seen`: the texts of the training."""
    pairs = measured_pairs(part, seen, seed)
    keys = torch.stack([classifier.embed(read([f.key_texts[j] for f in part.facts])) for j in range(2)], 1)
    texts = list(dict.fromkeys(pair.text for pair in pairs))
    rows: list[Tensor] = []
    named: list[list[bool]] = []
    for text in texts:
        rows.append(classifier.similarity(classifier.embed(read([text]))[0], keys))
        named.append([f.names_subject(text) for f in part.facts])
        if len(rows) % TEXTS_PER_STEP == 0:
            yield Progress(Phase.SUMMARIZE, len(rows), len(texts))
    number_of = {text: number for number, text in enumerate(texts)}
    of_pair = torch.tensor([number_of[p.text] for p in pairs], dtype=torch.long)
    to_all = torch.stack(rows)[of_pair]
    facts = torch.tensor([p.fact for p in pairs], dtype=torch.long)
    return ScopeMeasurement(
        pairs, to_all.gather(1, facts[:, None])[:, 0], to_all, torch.tensor(named, dtype=torch.bool)[of_pair]
    )


def _mean(flags: Tensor, of: Tensor) -> float | None:
    return float(flags[of].double().mean()) if of.any() else None
