"""What is asked of a model about a record, and what its answers come to: a record's measures, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from service.datasets.records import Record
from service.models.score import Score
from service.scores.hase_scores import erasure_share, kept_share, rewrite_share
from service.scores.scores import Pair, Resampling, accuracy, margin, share_kept, share_new

Measures = dict[str, float | None]

#: a measure -> what it is, for people; S is their harmonic mean where it says so
MEASURES = {
    "ES": "the prompt prefers the new object to the true one",
    "PS": "the paraphrases do",
    "NS": "the neighbours prefer their own object to the new one",
    "EM": "p(new) - p(true) on the prompt",
    "PM": "p(new) - p(true) on the paraphrases",
    "NM": "p(own) - p(new) on the neighbours",
    "p_new": "p(new) on the prompt",
    "exact": "the model says the new object, every token of it",
    "exact_paraphrase": "it does after the paraphrases",
    "exact_neighbour": "it says their own object after the neighbours",
    "accuracy": "tokens of the new object that are right (zsRE: efficacy)",
    "accuracy_paraphrase": "after the paraphrases (zsRE: paraphrase)",
    "accuracy_neighbour": "of the neighbours' own object (zsRE: specificity)",
    "GE": "entropy of generated n-grams",
    "RS": "likeness of generated texts to reference texts",
}
#: harmonic mean -> of which measures
SCORES = {
    "S": ("ES", "PS", "NS"),
    "S_accuracy": ("accuracy", "accuracy_paraphrase", "accuracy_neighbour"),
}
#: how much of what was possible the edits did (Hase et al. 2023)
CHANGES = {
    "rewrite": "of the possible change of p on the prompt",
    "paraphrase": "of the possible change of p on the paraphrases",
    "neighbour": "that the neighbours' p did not use of its possible change",
}


def ask(record: Record) -> list[tuple[str, str]]:
    """(prompt, object) pairs, whose scores `Answers.of` reads in the same order."""
    objects = (record.target_new,) if record.target_true is None else (record.target_new, record.target_true)
    pairs = [(prompt, said) for prompt in (record.text, *record.paraphrases) for said in objects]
    return pairs + [(n.prompt, said) for n in record.neighbours for said in (record.target_new, n.target)]


@dataclass(frozen=True)
class Answer:
    """Of one prompt: the new object, and the one that it contends with, where there is one."""

    new: Score
    true: Score | None


@dataclass(frozen=True)
class Answers:
    """What a model says to one record's prompts."""

    rewrite: Answer
    paraphrases: list[Answer]
    neighbours: list[Answer]

    @classmethod
    def of(cls, record: Record, scores: Sequence[Score]) -> Answers:
        found = iter(scores)
        known = record.target_true is not None
        wordings = [
            Answer(next(found), next(found) if known else None) for _ in range(1 + len(record.paraphrases))
        ]
        return cls(wordings[0], wordings[1:], [Answer(next(found), next(found)) for _ in record.neighbours])

    @property
    def holds(self) -> bool:
        """The new object is the more probable one, or is said where there is no other to compare it with."""
        return self.leads(0.0)

    def leads(self, margin: float) -> bool:
        """The same by some nats of mean log-probability."""
        new, true = self.rewrite.new, self.rewrite.true
        return new.says if true is None else new.log_p - true.log_p > margin

    def measures(self) -> Measures:
        """Shares and differences of one record; None for what it has no prompts or no objects for."""
        one, more, near = [self.rewrite], self.paraphrases, self.neighbours
        kept = margin(_pairs(near))
        return {
            "ES": share_new(_pairs(one)),
            "PS": share_new(_pairs(more)),
            "NS": share_kept(_pairs(near)),
            "EM": margin(_pairs(one)),
            "PM": margin(_pairs(more)),
            "NM": None if kept is None else -kept,
            "p_new": math.exp(self.rewrite.new.log_p),
            "exact": float(self.rewrite.new.says),
            "exact_paraphrase": _mean([float(a.new.says) for a in more]),
            "exact_neighbour": _mean([float(a.true.says) for a in near if a.true]),
            "accuracy": accuracy([(self.rewrite.new.right, self.rewrite.new.tokens)]),
            "accuracy_paraphrase": accuracy([(a.new.right, a.new.tokens) for a in more]),
            "accuracy_neighbour": accuracy([(a.true.right, a.true.tokens) for a in near if a.true]),
        }


def changes(before: Answers, after: Answers, objective: str) -> Measures:
    """How much of what was possible an edit did, by what it is for; on paraphrases and neighbours the mean.

    p is that of the object that was optimised: the new one, or the true one where it is to be erased or amplified.
    """
    true = objective != "write"
    share = erasure_share if objective == "erase" else rewrite_share

    def moved(was: Sequence[Answer], now: Sequence[Answer]) -> list[tuple[float, float]]:
        pairs = [
            (a.true if true else a.new, b.true if true else b.new) for a, b in zip(was, now, strict=True)
        ]
        return [(_joint(a), _joint(b)) for a, b in pairs if a and b]

    return {
        "rewrite": _mean([share(*p) for p in moved([before.rewrite], [after.rewrite])]),
        "paraphrase": _mean([share(*p) for p in moved(before.paraphrases, after.paraphrases)]),
        "neighbour": _mean([kept_share(*p) for p in moved(before.neighbours, after.neighbours)]),
    }


def summary(rows: Sequence[Mapping[str, float | None]], seed: int) -> dict[str, Any]:
    """The mean of every measure over records with its interval, and the scores combined of them; None where none has it."""
    drawn = _resampling(len(rows), seed)
    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        found[name] = _interval(drawn.interval(values), sum(v is not None for v in values))
    for name, parts in SCORES.items():
        if set(parts) <= set(names):
            columns = [[row.get(part) for row in rows] for part in parts]
            found[name] = _interval(drawn.score(columns), len(rows))
    return found


@lru_cache(maxsize=4)
def _resampling(n: int, seed: int) -> Resampling:
    """Of as many records, the same for all that is said of them: to draw takes longer than to average."""
    return Resampling(n, seed=seed)


def _interval(found: tuple[float, float, float] | None, n: int) -> dict[str, float] | None:
    return None if found is None else {"mean": found[0], "low": found[1], "high": found[2], "n": n}


def _pairs(answers: Sequence[Answer]) -> list[Pair]:
    return [(a.new.log_p, a.true.log_p) for a in answers if a.true]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _joint(score: Score) -> float:
    """The probability of the whole object."""
    return math.exp(score.log_p * score.tokens)
