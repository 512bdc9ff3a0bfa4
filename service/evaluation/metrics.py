"""The prompts on which a model is scored for a record, the measures of a record, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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

#: measure -> its description (Meng et al. 2022, Section 3.4 and Appendix; zsRE as in Meng et al. 2023)
MEASURES = {
    "ES": "efficacy: p(new) > p(true) on the prompt",
    "PS": "p(new) > p(true) on the paraphrases",
    "NS": "p(own) > p(new) on the neighbours",
    "EM": "p(new) - p(true) on the prompt",
    "PM": "p(new) - p(true) on the paraphrases",
    "NM": "p(own) - p(new) on the neighbours",
    "p_new": "p(new) on the prompt",
    "exact": "the new object is the greedy continuation of the prompt",
    "exact_paraphrase": "the same for the paraphrases",
    "exact_neighbour": "the own object is the greedy continuation of the neighbours",
    "accuracy": "correct tokens of the new object (zsRE: efficacy)",
    "accuracy_paraphrase": "the same for the paraphrases (zsRE: paraphrase)",
    "accuracy_neighbour": "correct tokens of the neighbours' own object (zsRE: specificity)",
    "GE": "entropy of generated n-grams",
    "RS": "similarity of generated texts to reference texts",
}
#: harmonic mean -> the measures that it combines
COMBINED_SCORES = {
    "S": ("ES", "PS", "NS"),
    "S_accuracy": ("accuracy", "accuracy_paraphrase", "accuracy_neighbour"),
}
#: share of the possible change that the edits made -> its description (Hase et al. 2023)
CHANGE_SCORES = {
    "rewrite": "share of the possible change of p on the prompt",
    "paraphrase": "share of the possible change of p on the paraphrases",
    "neighbour": "share of the possible change that p on the neighbours did not make",
}


def scoring_pairs(record: Record) -> list[tuple[str, str]]:
    """Return the (prompt, object) pairs of a record in the order in which `RecordScores.from_scores` reads their
    scores.
    """
    objects = (record.target_new,) if record.target_true is None else (record.target_new, record.target_true)
    pairs = [(prompt, object_) for prompt in (record.text, *record.paraphrases) for object_ in objects]
    return pairs + [
        (n.prompt, object_) for n in record.neighbours for object_ in (record.target_new, n.target)
    ]


@dataclass(frozen=True)
class PromptScores:
    """The scores of one prompt: of the new object, and of the object that it competes with, if there is one."""

    new: TargetScore
    true: TargetScore | None


@dataclass(frozen=True)
class RecordScores:
    """The scores of a model on one record's prompts."""

    rewrite: PromptScores
    paraphrases: list[PromptScores]
    neighbours: list[PromptScores]

    @classmethod
    def from_scores(cls, record: Record, scores: Iterable[TargetScore]) -> RecordScores:
        """Build the scores of a record from those of its `scoring_pairs`. Consumes exactly as many scores."""
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
        """Whether the new object is more probable than the true one, or greedy if no true object is known."""
        new, true = self.rewrite.new, self.rewrite.true
        return new.is_greedy if true is None else new.log_p > true.log_p

    def measures(self) -> Measures:
        """Return the measures of the record, None for those whose prompts or objects it lacks."""
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
            "exact_paraphrase": mean([float(a.new.is_greedy) for a in paraphrases]),
            "exact_neighbour": mean([float(a.true.is_greedy) for a in neighbours if a.true]),
            "accuracy": token_accuracy([(self.rewrite.new.correct_tokens, self.rewrite.new.num_tokens)]),
            "accuracy_paraphrase": token_accuracy(
                [(a.new.correct_tokens, a.new.num_tokens) for a in paraphrases]
            ),
            "accuracy_neighbour": token_accuracy(
                [(a.true.correct_tokens, a.true.num_tokens) for a in neighbours if a.true]
            ),
        }


def split_scores(records: Sequence[Record], scores: Iterable[TargetScore]) -> list[RecordScores]:
    """Return the scores of each record, from those of the `scoring_pairs` of all records."""
    score_iterator = iter(scores)
    return [RecordScores.from_scores(record, score_iterator) for record in records]


def change_scores(before: RecordScores, after: RecordScores, objective: str) -> Measures:
    """Return the share of the possible change that an edit made, as a mean over paraphrases and over neighbours.

    p is the joint probability of the optimised object: the new one to write, the true one to erase or amplify.
    """
    true = objective != "write"
    share = erasure_share if objective == "erase" else rewrite_share

    def moved(was: Sequence[PromptScores], now: Sequence[PromptScores]) -> list[tuple[float, float]]:
        pairs = [
            (a.true if true else a.new, b.true if true else b.new) for a, b in zip(was, now, strict=True)
        ]
        return [(_joint_probability(a), _joint_probability(b)) for a, b in pairs if a and b]

    return {
        "rewrite": mean([share(*p) for p in moved([before.rewrite], [after.rewrite])]),
        "paraphrase": mean([share(*p) for p in moved(before.paraphrases, after.paraphrases)]),
        "neighbour": mean([preserved_share(*p) for p in moved(before.neighbours, after.neighbours)]),
    }


def summarize(rows: Sequence[Mapping[str, float | None]], seed: int) -> dict[str, Any]:
    """Return the mean of every measure over records with its interval, and the combined scores.

    None if no record has it.
    """
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
    """Return the resampler for `n` records. It is cached, because drawing takes longer than averaging."""
    return BootstrapResampler(n, seed=seed)


def _interval_json(interval: tuple[float, float, float] | None, n: int) -> dict[str, float] | None:
    return (
        None if interval is None else {"mean": interval[0], "low": interval[1], "high": interval[2], "n": n}
    )


def _log_prob_pairs(answers: Sequence[PromptScores]) -> list[LogProbPair]:
    return [(a.new.log_p, a.true.log_p) for a in answers if a.true]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of none."""
    return math.fsum(values) / len(values) if values else None


def _joint_probability(score: TargetScore) -> float:
    """Return the probability of all tokens of the object."""
    return math.exp(score.log_p * score.num_tokens)
