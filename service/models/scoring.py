"""How probable an object is after a prompt: teacher forced, mean log-probability over its tokens (methods E.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from service.kit.steps import Progress, Stepper, run_to_completion
from service.models.loading import LoadedModel
from service.models.score import TargetScore
from service.models.token_batch import PaddedBatch, forward, pad, tokenize_prompt_and_target

SCORING_BATCH_SIZE = 16  # rows in one forward pass: a step shorter than one optimisation step of an edit
MAX_DISTRIBUTION_TOKENS = (
    512  # padded tokens in one pass of which the distributions at all positions are held, twice
)


def compute_log_probs(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Stepper[list[tuple[float, bool]]]:
    """For each (prompt, object): mean log p of the object's tokens, and whether they are the greedy continuation."""
    return [(s.log_p, s.is_greedy) for s in (yield from score_targets(model, pairs, phase))]


def score_targets(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Stepper[list[TargetScore]]:
    """The score of each (prompt, object).

    Of an object that leads past the model's last position, what fits is measured. Pairs that the model reads alike (one
    prompt with two objects of one token) are read once.
    """
    tokenized = [tokenize_prompt_and_target(model, p, t) for p, t in pairs]
    objects = [t[: max(1, model.max_positions - len(p))] for p, t in tokenized]
    pairs_by_text: dict[tuple[int, ...], list[int]] = defaultdict(
        list
    )  # what is read -> the pairs that read it
    for i, ((prompt, _), target) in enumerate(zip(tokenized, objects, strict=True)):
        pairs_by_text[*prompt, *target[:-1]].append(i)  # nothing follows an object's last token
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


def _score(logits: Tensor, target: Sequence[int]) -> TargetScore:
    """Of logits (n, V), one for each token of an object."""
    target_ids = torch.tensor(target, device=logits.device)
    logp = logits.log_softmax(-1).gather(1, target_ids[:, None])
    correct = int((logits.argmax(-1) == target_ids).sum())
    return TargetScore(logp.mean().item(), correct == len(target), correct, len(target))


def log_probs_blocking(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """`log_prob_steps`, run to the end."""
    return run_to_completion(compute_log_probs(model, pairs))


def compute_perplexity(model: LoadedModel, texts: Sequence[str]) -> Stepper[float]:
    """exp of the mean negative log-probability per predicted token over some texts (a text of n tokens has n - 1).

    Of a text longer than the model's positions, what fits is measured.
    """
    rows = _encode_sorted(model, texts)
    total, count = 0.0, 0
    for start in range(0, len(rows), SCORING_BATCH_SIZE):
        batch = pad(rows[start : start + SCORING_BATCH_SIZE], model)
        with torch.no_grad():
            logp = forward(model, batch).float().log_softmax(-1)
        total -= _sum_log_probs(logp, batch)
        count += int(batch.mask[:, 1:].sum())
        yield Progress("perplexity", min(start + SCORING_BATCH_SIZE, len(rows)), len(rows))
    return float(torch.tensor(total / max(1, count)).exp())


class Drift(NamedTuple):
    """What a change of the weights does to the model on plain texts."""

    loss_before: float  #: loss: the mean of -log p over the predicted tokens
    loss_after: float
    kl: float  #: mean over all positions of KL(p before || p after) of the next token, in nats


def measure_drift(
    model: LoadedModel, texts: Sequence[str], apply_edit: Callable[[], AbstractContextManager[object]]
) -> Stepper[Drift]:
    """Loss before and after, and how far the predictions move. `edited` puts the changed weights in place.

    Of a text longer than the model's positions, what fits is measured.
    """
    rows = _encode_sorted(model, texts)
    loss_before = loss_after = kl = 0.0
    predicted = positions = done = 0
    for batch_rows in _batches_by_tokens(rows):
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
        yield Progress("plain texts", done, len(rows))
    return Drift(loss_before / max(1, predicted), loss_after / max(1, predicted), kl / max(1, positions))


def _encode_sorted(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Texts of which something is predicted, as tokens, as far as they fit; the shortest first."""
    coded = (model.encode(t)[0][: model.max_positions] for t in texts)
    return sorted((r for r in coded if len(r) > 1), key=len)


def _batches_by_tokens(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows, the shortest first, in batches of at most WHOLE padded tokens, or of one."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > MAX_DISTRIBUTION_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _sum_log_probs(logp: Tensor, batch: PaddedBatch) -> float:
    """The sum of log p (B, T, V) over all predicted tokens of a batch."""
    token_log_probs = logp[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
    return float((token_log_probs * batch.mask[:, 1:]).double().sum())
