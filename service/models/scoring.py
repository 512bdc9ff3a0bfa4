"""How probable an object is after a prompt: teacher forced, mean log-probability over its tokens (methods E.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from service.kit.steps import Progress, Steps, finish
from service.models.loading import LoadedModel
from service.models.score import Score
from service.models.token_batch import Batch, forward, pad, prompt_and_target

CHUNK = 16  # rows in one forward pass: a step shorter than one optimisation step of an edit
WHOLE = 512  # padded tokens in one pass of which the distributions at all positions are held, twice


def log_prob_steps(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Steps[list[tuple[float, bool]]]:
    """For each (prompt, object): mean log p of the object's tokens, and whether they are the greedy continuation."""
    return [(s.log_p, s.says) for s in (yield from score_steps(model, pairs, phase))]


def score_steps(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Steps[list[Score]]:
    """The score of each (prompt, object).

    Of an object that leads past the model's last position, what fits is measured. Pairs that the model reads alike (one
    prompt with two objects of one token) are read once.
    """
    found = [prompt_and_target(model, p, t) for p, t in pairs]
    objects = [t[: max(1, model.positions - len(p))] for p, t in found]
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what is read -> the pairs that read it
    for i, ((prompt, _), target) in enumerate(zip(found, objects, strict=True)):
        asked[*prompt, *target[:-1]].append(i)  # nothing follows an object's last token
    texts = sorted(asked, key=len)
    result = [Score(0.0, False, 0, 0)] * len(pairs)
    for at in range(0, len(texts), CHUNK):
        chosen = texts[at : at + CHUNK]
        longest = max(len(objects[i]) for text in chosen for i in asked[text])
        with torch.no_grad():
            logits = forward(model, pad(chosen, model, side="left"), longest).float()
        for said, text in zip(logits, chosen, strict=True):
            for i in asked[text]:
                result[i] = _score(said[-len(objects[i]) :], objects[i])
        yield Progress(phase, min(at + CHUNK, len(texts)), len(texts))
    return result


def _score(said: Tensor, target: Sequence[int]) -> Score:
    """Of logits (n, V), one for each token of an object."""
    wanted = torch.tensor(target, device=said.device)
    logp = said.log_softmax(-1).gather(1, wanted[:, None])
    right = int((said.argmax(-1) == wanted).sum())
    return Score(logp.mean().item(), right == len(target), right, len(target))


def log_probs(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """`log_prob_steps`, run to the end."""
    return finish(log_prob_steps(model, pairs))


def perplexity_steps(model: LoadedModel, texts: Sequence[str]) -> Steps[float]:
    """exp of the mean negative log-probability per predicted token over some texts (a text of n tokens has n - 1).

    Of a text longer than the model's positions, what fits is measured.
    """
    rows = _coded(model, texts)
    total, count = 0.0, 0
    for at in range(0, len(rows), CHUNK):
        batch = pad(rows[at : at + CHUNK], model)
        with torch.no_grad():
            logp = forward(model, batch).float().log_softmax(-1)
        total -= _said(logp, batch)
        count += int(batch.mask[:, 1:].sum())
        yield Progress("perplexity", min(at + CHUNK, len(rows)), len(rows))
    return float(torch.tensor(total / max(1, count)).exp())


class Drift(NamedTuple):
    """What a change of the weights does to the model on plain texts."""

    before: float  #: loss: the mean of -log p over the predicted tokens
    after: float
    kl: float  #: mean over all positions of KL(p before || p after) of the next token, in nats


def drift_steps(
    model: LoadedModel, texts: Sequence[str], edited: Callable[[], AbstractContextManager[object]]
) -> Steps[Drift]:
    """Loss before and after, and how far the predictions move. `edited` puts the changed weights in place.

    Of a text longer than the model's positions, what fits is measured.
    """
    rows = _coded(model, texts)
    before = after = kl = 0.0
    predicted = positions = done = 0
    for some in _few(rows):
        batch = pad(some, model)
        with torch.no_grad():
            old = forward(model, batch).float().log_softmax(-1)
            with edited():
                new = forward(model, batch).float().log_softmax(-1)
        before -= _said(old, batch)
        after -= _said(new, batch)
        kl += ((old.exp() * (old - new)).sum(-1) * batch.mask).double().sum().item()
        predicted += int(batch.mask[:, 1:].sum())
        positions += int(batch.mask.sum())
        done += len(some)
        yield Progress("plain texts", done, len(rows))
    return Drift(before / max(1, predicted), after / max(1, predicted), kl / max(1, positions))


def _coded(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Texts of which something is predicted, as tokens, as far as they fit; the shortest first."""
    coded = (model.encode(t)[0][: model.positions] for t in texts)
    return sorted((r for r in coded if len(r) > 1), key=len)


def _few(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows, the shortest first, in batches of at most WHOLE padded tokens, or of one."""
    some: list[list[int]] = []
    for row in rows:
        if some and len(row) * (len(some) + 1) > WHOLE:
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def _said(logp: Tensor, batch: Batch) -> float:
    """The sum of log p (B, T, V) over all predicted tokens of a batch."""
    said = logp[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0]
    return float((said * batch.mask[:, 1:]).double().sum())
