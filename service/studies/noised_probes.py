"""Scores and greedy answers of a model whose subject embeddings are noised with one fixed draw (Hase et al. 2023,
Section 5.3).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from service.datasets.record import Record
from service.editing.subject_noise import noise_hook_right_padded
from service.errors import InvalidInput
from service.evaluation.metrics import scoring_pairs
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.kit.text import Statement, fill_prompt, locate_subject
from service.models.hooks import replace_output
from service.models.loading import LoadedModel
from service.models.score import TargetScore
from service.models.scoring import score_targets
from service.models.token_batch import (
    TokenizedStatement,
    forward,
    pad,
    tokenize_prompt_and_target,
    tokenize_statement,
)
from service.tracing.noise import NoiseLevel, draw_noise


def subject_noise(model: LoadedModel, record: Record, level: NoiseLevel, seed: int) -> Tensor:
    """Return the noise (n, d), in fp64, that is added to the embeddings of the subject's n tokens."""
    begin, end = tokenize_statement(model, fill_prompt(record.prompt, record.subject)).subject
    return level.value * draw_noise(1, end - begin, model.embedding_size, seed)[0]


def noised_greedy_answer(model: LoadedModel, record: Record, noise: Tensor) -> str:
    """Return the greedy continuation of the prompt under noise, with as many tokens as the true object."""
    prompt = tokenize_statement(model, fill_prompt(record.prompt, record.subject))
    _, true = tokenize_prompt_and_target(model, record.text, record.target_true or record.target_new)
    output_ids: list[int] = []
    for _ in true[: model.max_positions - len(prompt.ids)]:
        with torch.no_grad(), _with_noised_subject(model, prompt, noise):
            logits = forward(model, pad([prompt.ids + output_ids], model), 1)
        output_ids.append(int(logits[0, -1].argmax()))
    return model.decode(output_ids)


def score_under_noise(model: LoadedModel, record: Record, noise: Tensor) -> Stepper[list[TargetScore]]:
    """Return the scores of a record's `scoring_pairs`, with the subject noised in every prompt that contains it."""
    pairs = scoring_pairs(record)
    subject_pair_count = len(pairs) - 2 * len(record.neighbours)
    scores: list[TargetScore] = []
    for prompt, target in pairs[:subject_pair_count]:
        statement = _locate_subject_in(record, prompt)
        if statement is None:
            scores += yield from score_targets(model, [(prompt, target)])
            continue
        # one row in one step: no padding moves the subject, and no step ends while the hook is installed
        with _with_noised_subject(model, tokenize_statement(model, statement), noise):
            scores += run_to_completion(score_targets(model, [(prompt, target)]))
        yield Progress(Phase.MEASURE, len(scores), len(pairs))
    return scores + (yield from score_targets(model, pairs[subject_pair_count:]))


def _locate_subject_in(record: Record, prompt: str) -> Statement | None:
    """Return the prompt with the span of the subject, or None if it does not contain the subject."""
    if prompt == record.text:
        return fill_prompt(record.prompt, record.subject)
    try:
        return locate_subject(prompt, record.subject)
    except InvalidInput:
        return None


def _with_noised_subject(
    model: LoadedModel, text: TokenizedStatement, noise: Tensor
) -> AbstractContextManager[None]:
    """Noise the subject of a batch with one row that begins with this text."""
    hook = noise_hook_right_padded([text], [noise])
    assert hook is not None
    return replace_output(model.embedding, hook)
