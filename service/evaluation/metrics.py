"""What is asked of a model about a record, and what its answers come to: a record's measures, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from service.datasets.record import Record
from service.models.score import TargetScore
from service.scores.hase_scores import erasure_share, preserved_share, rewrite_share
from service.scores.scores import (
    BootstrapResampler,
    LogProbPair,
    probability_margin,
    share_preferring_new,
    share_preferring_true,
    token_accuracy,
)

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
COMBINED_SCORES = {
    "S": ("ES", "PS", "NS"),
    "S_accuracy": ("accuracy", "accuracy_paraphrase", "accuracy_neighbour"),
}
#: how much of what was possible the edits did (Hase et al. 2023)
CHANGE_SCORES = {
    "rewrite": "of the possible change of p on the prompt",
    "paraphrase": "of the possible change of p on the paraphrases",
    "neighbour": "that the neighbours' p did not use of its possible change",
}


def scoring_pairs(record: Record) -> list[tuple[str, str]]:
    """(prompt, object) pairs, whose scores `Answers.of` reads in the same order."""
    objects = (record.target_new,) if record.target_true is None else (record.target_new, record.target_true)
    pairs = [(prompt, object_) for prompt in (record.text, *record.paraphrases) for object_ in objects]
    return pairs + [
        (n.prompt, object_) for n in record.neighbours for object_ in (record.target_new, n.target)
    ]


@dataclass(frozen=True)
class PromptScores:
    """Of one prompt: the new object, and the one that it contends with, where there is one."""

    new: TargetScore
    true: TargetScore | None


@dataclass(frozen=True)
class RecordScores:
    """What a model says to one record's prompts."""

    rewrite: PromptScores
    paraphrases: list[PromptScores]
    neighbours: list[PromptScores]

    @classmethod
    def from_scores(cls, record: Record, scores: Sequence[TargetScore]) -> RecordScores:
        score_iterator = iter(scores)
        has_true_object = record.target_true is not None
        prompt_scores = [
            PromptScores(next(score_iterator), next(score_iterator) if has_true_object else None)
            for _ in range(1 + len(record.paraphrases))
        ]
        return cls(
            prompt_scores[0],
            prompt_scores[1:],
            [PromptScores(next(score_iterator), next(score_iterator)) for _ in record.neighbours],
        )

    @property
    def edit_holds(self) -> bool:
        """The new object is the more probable one, or is said where there is no other to compare it with."""
        return self.has_margin(0.0)

    def has_margin(self, margin: float) -> bool:
        """The same by some nats of mean log-probability."""
        new, true = self.rewrite.new, self.rewrite.true
        return new.is_greedy if true is None else new.log_p - true.log_p > margin

    def measures(self) -> Measures:
        """Shares and differences of one record; None for what it has no prompts or no objects for."""
        rewrites, paraphrases, neighbours = [self.rewrite], self.paraphrases, self.neighbours
        neighbour_margin = probability_margin(_log_prob_pairs(neighbours))
        return {
            "ES": share_preferring_new(_log_prob_pairs(rewrites)),
            "PS": share_preferring_new(_log_prob_pairs(paraphrases)),
            "NS": share_preferring_true(_log_prob_pairs(neighbours)),
            "EM": probability_margin(_log_prob_pairs(rewrites)),
            "PM": probability_margin(_log_prob_pairs(paraphrases)),
            "NM": None if neighbour_margin is None else -neighbour_margin,
            "p_new": math.exp(self.rewrite.new.log_p),
            "exact": float(self.rewrite.new.is_greedy),
            "exact_paraphrase": _mean([float(a.new.is_greedy) for a in paraphrases]),
            "exact_neighbour": _mean([float(a.true.is_greedy) for a in neighbours if a.true]),
            "accuracy": token_accuracy([(self.rewrite.new.correct_tokens, self.rewrite.new.num_tokens)]),
            "accuracy_paraphrase": token_accuracy(
                [(a.new.correct_tokens, a.new.num_tokens) for a in paraphrases]
            ),
            "accuracy_neighbour": token_accuracy(
                [(a.true.correct_tokens, a.true.num_tokens) for a in neighbours if a.true]
            ),
        }


def change_scores(before: RecordScores, after: RecordScores, objective: str) -> Measures:
    """How much of what was possible an edit did, by what it is for; on paraphrases and neighbours the mean.

    p is that of the object that was optimised: the new one, or the true one where it is to be erased or amplified.
    """
    true = objective != "write"
    share = erasure_share if objective == "erase" else rewrite_share

    def moved(was: Sequence[PromptScores], now: Sequence[PromptScores]) -> list[tuple[float, float]]:
        pairs = [
            (a.true if true else a.new, b.true if true else b.new) for a, b in zip(was, now, strict=True)
        ]
        return [(_joint_probability(a), _joint_probability(b)) for a, b in pairs if a and b]

    return {
        "rewrite": _mean([share(*p) for p in moved([before.rewrite], [after.rewrite])]),
        "paraphrase": _mean([share(*p) for p in moved(before.paraphrases, after.paraphrases)]),
        "neighbour": _mean([preserved_share(*p) for p in moved(before.neighbours, after.neighbours)]),
    }


def summarize(rows: Sequence[Mapping[str, float | None]], seed: int) -> dict[str, Any]:
    """The mean of every measure over records with its interval, and the scores combined of them; None where none has it."""
    resampler = _resampler(len(rows), seed)
    names = dict.fromkeys(name for row in rows for name in row)
    summarized: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        summarized[name] = _interval_json(resampler.interval(values), sum(v is not None for v in values))
    for name, parts in COMBINED_SCORES.items():
        if set(parts) <= set(names):
            columns = [[row.get(part) for row in rows] for part in parts]
            summarized[name] = _interval_json(resampler.combined_interval(columns), len(rows))
    return summarized


@lru_cache(maxsize=4)
def _resampler(n: int, seed: int) -> BootstrapResampler:
    """Of as many records, the same for all that is said of them: to draw takes longer than to average."""
    return BootstrapResampler(n, seed=seed)


def _interval_json(interval: tuple[float, float, float] | None, n: int) -> dict[str, float] | None:
    return (
        None if interval is None else {"mean": interval[0], "low": interval[1], "high": interval[2], "n": n}
    )


def _log_prob_pairs(answers: Sequence[PromptScores]) -> list[LogProbPair]:
    return [(a.new.log_p, a.true.log_p) for a in answers if a.true]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _joint_probability(score: TargetScore) -> float:
    """The probability of the whole object."""
    return math.exp(score.log_p * score.num_tokens)
