"""How probable an object is after a prompt: teacher forced, mean log-probability over its tokens (methods E.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from service.models.loading import LoadedModel
from service.models.prompts import forward, pad, prompt_and_target
from service.progress import Progress, Steps, finish

CHUNK = 16  # rows in one forward pass: a step shorter than one optimisation step of an edit


def log_prob_steps(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Steps[list[tuple[float, bool]]]:
    """For each (prompt, object): mean log p of the object's tokens, and whether they are the greedy continuation.

    Of an object that leads past the model's last position, what fits is measured. Pairs that the model reads alike (one
    prompt with two objects of one token) are read once.
    """
    found = [prompt_and_target(model, p, t) for p, t in pairs]
    objects = [t[: max(1, model.positions - len(p))] for p, t in found]
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what is read -> the pairs that read it
    for i, ((prompt, _), target) in enumerate(zip(found, objects, strict=True)):
        asked[*prompt, *target[:-1]].append(i)  # nothing follows an object's last token
    texts = sorted(asked, key=len)
    result: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
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


def _score(said: Tensor, target: Sequence[int]) -> tuple[float, bool]:
    """Of logits (n, V), one for each token of an object."""
    wanted = torch.tensor(target, device=said.device)
    logp = said.log_softmax(-1).gather(1, wanted[:, None])
    return logp.mean().item(), bool((said.argmax(-1) == wanted).all())


def log_probs(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """`log_prob_steps`, run to the end."""
    return finish(log_prob_steps(model, pairs))


def perplexity_steps(model: LoadedModel, texts: Sequence[str]) -> Steps[float]:
    """exp of the mean negative log-probability per predicted token over some texts (a text of n tokens has n - 1).

    Of a text longer than the model's positions, what fits is measured.
    """
    coded = (model.encode(t)[0][: model.positions] for t in texts)
    rows = sorted((r for r in coded if len(r) > 1), key=len)
    total, count = 0.0, 0
    for at in range(0, len(rows), CHUNK):
        batch = pad(rows[at : at + CHUNK], model)
        with torch.no_grad():
            logp = forward(model, batch)[:, :-1].float().log_softmax(-1)
        said = logp.gather(2, batch.ids[:, 1:, None])[..., 0]
        mask = batch.mask[:, 1:]
        total -= (said * mask).double().sum().item()
        count += int(mask.sum())
        yield Progress("perplexity", min(at + CHUNK, len(rows)), len(rows))
    return float(torch.tensor(total / max(1, count)).exp())
