"""Score objects after prompts: teacher forced, mean log-probability over the object's tokens (Meng et al. 2022)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from service.kit.separator import Separator
from service.kit.steps import Phase, Progress, Stepper, run_to_completion
from service.models.loading import LoadedModel
from service.models.score import TargetScore, TokenScore
from service.models.token_batch import PaddedBatch, forward, pad, tokenize_prompt_and_target

SCORING_BATCH_SIZE = (
    16  # rows in one forward pass; such a step is shorter than one optimization step of an edit
)
# Padded tokens in one pass that computes the distributions at all positions: the longest step of measuring an edit.
MAX_PERPLEXITY_TOKENS = 192
# Padded tokens in one pass that keeps the distributions at all positions, before and after a change.
MAX_DISTRIBUTION_TOKENS = 512


def compute_log_probs(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: Phase = Phase.MEASURE
) -> Stepper[list[tuple[float, bool]]]:
    """Return, for each (prompt, object), the mean log p of the object's tokens and whether they are the greedy
    continuation."""
    return [(s.log_p, s.is_greedy) for s in (yield from score_targets(model, pairs, phase))]


def score_targets(
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    phase: Phase = Phase.MEASURE,
    separators: Sequence[Separator | None] | None = None,
) -> Stepper[list[TargetScore]]:
    """Return the score of each (prompt, object), with the usual separators between them or the given ones.

    An object that exceeds the model's positions is measured as far as it fits. Pairs with the same input tokens (one
    prompt with two objects of one token) share one forward pass.
    """
    tokenized = yield from _tokenize_pairs(model, pairs, separators or [None] * len(pairs), phase)
    objects = [t[: max(1, model.max_positions - len(p))] for p, t in tokenized]
    pairs_by_text: dict[tuple[int, ...], list[int]] = defaultdict(list)  # input tokens -> indices of pairs
    for i, ((prompt, _), target) in enumerate(zip(tokenized, objects, strict=True)):
        pairs_by_text[*prompt, *target[:-1]].append(i)  # the object's last token is not an input
    texts = sorted(pairs_by_text, key=len)
    result = [TargetScore(0.0, False, 0, 0)] * len(pairs)
    for start in range(0, len(texts), SCORING_BATCH_SIZE):
        batch_texts = texts[start : start + SCORING_BATCH_SIZE]
        longest = max(len(objects[i]) for text in batch_texts for i in pairs_by_text[text])
        with torch.no_grad():
            logits = forward(model, pad(batch_texts, model, side="left"), longest).float()
        for row_logits, text in zip(logits, batch_texts, strict=True):
            for i in pairs_by_text[text]:
                result[i] = _score(row_logits[-len(objects[i]) :], objects[i])
        yield Progress(phase, min(start + SCORING_BATCH_SIZE, len(texts)), len(texts))
    return result


def _tokenize_pairs(
    model: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    separators: Sequence[Separator | None],
    phase: Phase,
) -> Stepper[list[tuple[list[int], list[int]]]]:
    """Return the token ids of prompts and objects. To route a prompt takes a pass of the lower layers: a step routes
    as many prompts as it scores."""
    tokenized: list[tuple[list[int], list[int]]] = []
    for (prompt, target), chosen in zip(pairs, separators, strict=True):
        tokenized.append(tokenize_prompt_and_target(model, prompt, target, chosen))
        if model.routing.router is not None and len(tokenized) % SCORING_BATCH_SIZE == 0:
            yield Progress(phase, 0, len(pairs))
    return tokenized


def _score(logits: Tensor, target: Sequence[int]) -> TargetScore:
    """Return the score of an object of n tokens with logits (n, V)."""
    target_ids = torch.tensor(target, device=logits.device)
    logp = logits.log_softmax(-1).gather(1, target_ids[:, None])
    greedy = (logits.argmax(-1) == target_ids).tolist()
    tokens = tuple(map(TokenScore, target, logp[:, 0].tolist(), greedy))
    correct = sum(greedy)
    return TargetScore(logp.mean().item(), correct == len(target), correct, len(target), tokens)


def log_probs_blocking(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Return the result of `compute_log_probs`, run to completion."""
    return run_to_completion(compute_log_probs(model, pairs))


def compute_perplexity(model: LoadedModel, texts: Sequence[str]) -> Stepper[float]:
    """Return exp of the mean negative log-probability per predicted token (a text of n tokens has n - 1).

    A text that exceeds the model's positions is truncated.
    """
    rows = _encode_sorted(model, texts)
    total, count = 0.0, 0
    done = 0
    for batch_rows in _batches_by_tokens(rows, MAX_PERPLEXITY_TOKENS):
        batch = pad(batch_rows, model)
        with torch.no_grad():
            logp = forward(model, batch).float().log_softmax(-1)
        total -= _sum_log_probs(logp, batch)
        count += int(batch.mask[:, 1:].sum())
        done += len(batch_rows)
        yield Progress(Phase.PERPLEXITY, done, len(rows))
    return float(torch.tensor(total / max(1, count)).exp())


class Drift(NamedTuple):
    """The effect of changed weights on the model's predictions for texts."""

    loss_before: float  #: mean of -log p over the predicted tokens, in nats
    loss_after: float
    kl: float  #: mean over all positions of KL(p before || p after) of the next token, in nats


def measure_drift(
    model: LoadedModel, texts: Sequence[str], apply_edit: Callable[[], AbstractContextManager[object]]
) -> Stepper[Drift]:
    """Return the loss before and after a change, and the KL divergence. `apply_edit` installs the changed weights.

    A text that exceeds the model's positions is truncated.
    """
    rows = _encode_sorted(model, texts)
    loss_before = loss_after = kl = 0.0
    predicted = positions = done = 0
    for batch_rows in _batches_by_tokens(rows, MAX_DISTRIBUTION_TOKENS):
        batch = pad(batch_rows, model)
        with torch.no_grad():
            old = forward(model, batch).float().log_softmax(-1)
            with apply_edit():
                new = forward(model, batch).float().log_softmax(-1)
        loss_before -= _sum_log_probs(old, batch)
        loss_after -= _sum_log_probs(new, batch)
        kl += ((old.exp() * (old - new)).sum(-1) * batch.mask).double().sum().item()
        predicted += int(batch.mask[:, 1:].sum())
        positions += int(batch.mask.sum())
        done += len(batch_rows)
        yield Progress(Phase.DRIFT, done, len(rows))
    return Drift(loss_before / max(1, predicted), loss_after / max(1, predicted), kl / max(1, positions))


def _encode_sorted(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts of at least two tokens, truncated to the model's positions, shortest first."""
    coded = (model.encode(t)[0][: model.max_positions] for t in texts)
    return sorted((r for r in coded if len(r) > 1), key=len)


def _batches_by_tokens(rows: Sequence[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Yield rows, shortest first, in batches of at most `max_tokens` padded tokens, or of one row."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _sum_log_probs(logp: Tensor, batch: PaddedBatch) -> float:
    """Return the sum of log p (B, T, V) over the predicted tokens of a batch."""
    token_log_probs = logp[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
    return float((token_log_probs * batch.mask[:, 1:]).double().sum())
