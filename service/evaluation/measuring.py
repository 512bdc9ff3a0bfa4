"""Measurements of a model with some weights in place: scores of records, damage to plain texts, generated texts,
norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from service.datasets.record import Record
from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence
from service.engine.versioned_model import VersionedModel
from service.evaluation.metrics import RecordScores, scoring_pairs, split_scores
from service.kit.steps import Phase, Progress, Stepper
from service.models.score import TargetScore
from service.models.scoring import measure_drift, score_targets
from service.patches.patch import PatchSet
from service.schemas import Sampling

T = TypeVar("T")
GENERATION_LENGTH = 100  # tokens of a generated text, including its prompt (Meng et al. 2022)
GENERATION_TOP_K = 5  # the same
GENERATION_BATCH_SIZE = 32  # texts generated in one batch


def score_pairs(
    replica: VersionedModel, records: Sequence[Record], patch: PatchSet
) -> Stepper[list[TargetScore]]:
    """Return the scores of all pairs of `scoring_pairs`, record after record."""
    pairs = [pair for r in records for pair in scoring_pairs(r)]
    return (yield from replica.step_with_patch(patch, score_targets(replica.base, pairs)))


def score_records(
    replica: VersionedModel, records: Sequence[Record], patch: PatchSet
) -> Stepper[list[RecordScores]]:
    """Return the scores of each record."""
    return split_scores(records, (yield from score_pairs(replica, records, patch)))


def texts_without_edited_facts(texts: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Return the texts that do not state an edited fact.

    A text states a fact if it contains the record's subject and its true object, or the subject alone if no true
    object is known.
    """
    edited_facts = [(r.subject, r.target_true or r.subject) for r in records]
    return [t for t in texts if not any(subject in t and object_ in t for subject, object_ in edited_facts)]


def evenly_spaced(items: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` of the items at equal distances."""
    return list(items[:: max(1, len(items) // limit)][:limit])


def measure_damage(
    replica: VersionedModel, texts: Sequence[str], patch: PatchSet
) -> Stepper[dict[str, float]]:
    """Return loss and perplexity on texts before and after, and the drift.

    Loss is in nats per token. Drift is the KL divergence of the next-token distribution in nats.
    """
    drift = yield from measure_drift(replica.base, texts, partial(replica.use_patch, patch))
    return {
        "loss_before": drift.loss_before,
        "loss_after": drift.loss_after,
        "loss_rise": drift.loss_after / drift.loss_before - 1 if drift.loss_before else 0.0,
        "perplexity_before": _exp(drift.loss_before),
        "perplexity_after": _exp(drift.loss_after),
        "drift": drift.kl,
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def relative_weight_changes(replica: VersionedModel, patch: PatchSet) -> dict[str, float]:
    """Return ||W - W0|| / ||W0|| of every edited weight, by layer and part."""
    return {
        f"{site.layer}.{site.part}": _relative_distance(
            patch.weights[site], replica.base.parameter(site).data
        )
        for site in sorted(patch.weights)
    }


def _relative_distance(edited: Tensor, base: Tensor) -> float:
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return float(norm(edited.float() - base.float()) / norm(base))


def generate_texts(replica: VersionedModel, prompts: Sequence[str], seed: int) -> Stepper[list[str]]:
    """Return one sampled text for each prompt, including the prompt, from the current weights."""
    model = replica.base
    texts: list[str] = []
    for start in range(0, len(prompts), GENERATION_BATCH_SIZE):
        batch_prompts = prompts[start : start + GENERATION_BATCH_SIZE]
        rows: list[DecodingSequence] = []
        for i, prompt in enumerate(batch_prompts, start):
            length = max(1, GENERATION_LENGTH - len(model.encode(prompt)[0]))
            sampling = Sampling(max_new_tokens=length, temperature=1, top_k=GENERATION_TOP_K, seed=seed + i)
            rows.append(new_sequence(model, prompt, sampling))
        batch = DecodingBatch(model, rows)
        while len(batch):
            batch.step()
            yield Progress(Phase.GENERATE, start, len(prompts))
        texts += [prompt + r.text for prompt, r in zip(batch_prompts, rows, strict=True)]
    return texts
