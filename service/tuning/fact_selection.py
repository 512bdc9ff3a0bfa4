"""The facts that a recipe is tuned on, and whether the model reads them better after its BOS token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from service.datasets.record import Record, record_fits
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel, with_bos
from service.models.scoring import score_targets
from service.tuning import search_space

RECORDS_PER_BATCH = 32  # records that are scored as one batch


class BosLogProbs(NamedTuple):
    """Mean log-probability of true objects, without and with the BOS token before the text."""

    without_bos: float
    with_bos: float


def select_known_records(model: LoadedModel, records: Sequence[Record], limit: int) -> Stepper[list[Record]]:
    """Return the first `limit` records of distinct subjects whose true object is the model's greedy answer."""
    known_records: dict[str, Record] = {}
    for start in range(0, len(records), RECORDS_PER_BATCH):
        batch = [
            r
            for r in records[start : start + RECORDS_PER_BATCH]
            if r.subject not in known_records and _has_scorable_true_object(model, r)
        ]
        scores = yield from score_targets(model, [(r.text, str(r.target_true)) for r in batch])
        known_records |= {r.subject: r for r, s in zip(batch, scores, strict=True) if s.is_greedy}
        yield Progress(Phase.PROBE, min(len(known_records), limit), limit)
        if len(known_records) >= limit:
            break
    if len(known_records) < search_space.MIN_FACTS:
        raise InvalidInput(
            f"the model knows {len(known_records)} of {len(records)} facts, and a recipe needs at least {search_space.MIN_FACTS}: "
            "give a file of facts that it knows.",
            "facts",
        )
    return list(known_records.values())[:limit]


def _has_scorable_true_object(model: LoadedModel, record: Record) -> bool:
    return record.target_true is not None and record_fits(record, model.text_encoder)


def score_with_and_without_bos(model: LoadedModel, records: Sequence[Record]) -> Stepper[BosLogProbs]:
    """Return the mean log-probability of true objects after prompts and paraphrases, without and with BOS."""
    pairs = [
        (p, str(r.target_true))
        for r in records
        if _has_scorable_true_object(model, r)
        for p in (r.text, *r.paraphrases)
    ]
    means = []
    for variant in (model, with_bos(model)):
        scores = yield from score_targets(variant, pairs)
        means.append(sum(s.log_p for s in scores) / max(1, len(scores)))
    return BosLogProbs(*means)


def prefers_bos(model: LoadedModel, log_probs: BosLogProbs) -> bool:
    """Return whether BOS improves the model's answers. False if its tokenizer already adds BOS."""
    return log_probs.with_bos > log_probs.without_bos and with_bos(model) is not model
