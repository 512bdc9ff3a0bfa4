"""How probable an object is after a prompt: teacher forced, mean log-probability over its tokens (methods E.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from service.models.loading import LoadedModel
from service.models.prompts import forward, pad, prompt_and_target
from service.progress import Progress, Steps, finish

CHUNK = 16  # rows in one forward pass: a step shorter than one optimisation step of an edit


def log_prob_steps(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], phase: str = "measure"
) -> Steps[list[tuple[float, bool]]]:
    """For each (prompt, object): mean log p of the object's tokens, and whether they are the greedy continuation.

    Of an object that leads past the model's last position, what fits is measured.
    """
    found = [prompt_and_target(model, p, t) for p, t in pairs]
    coded = [(p, t[: max(1, model.positions - len(p))]) for p, t in found]
    order = sorted(range(len(coded)), key=lambda i: sum(map(len, coded[i])))
    result: list[tuple[float, bool]] = [(0.0, False)] * len(coded)
    for at in range(0, len(order), CHUNK):
        chosen = order[at : at + CHUNK]
        with torch.no_grad():
            logits = forward(model, pad([coded[i][0] + coded[i][1] for i in chosen], model))
        for row, i in enumerate(chosen):
            prompt, target = coded[i]
            said = logits[row, len(prompt) - 1 : len(prompt) + len(target) - 1].float()
            wanted = torch.tensor(target, device=said.device)
            logp = said.log_softmax(-1).gather(1, wanted[:, None])
            result[i] = (logp.mean().item(), bool((said.argmax(-1) == wanted).all()))
        yield Progress(phase, min(at + CHUNK, len(order)), len(order))
    return result


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


def answer_steps(model: LoadedModel, prompt: str, length: int) -> Steps[str]:
    """The greedy continuation of a prompt, at most `length` tokens, as text."""
    ids, _ = model.encode(prompt)
    start = len(ids)
    end = model.tokenizer.eos_token_id
    for i in range(min(length, model.positions - start)):
        with torch.no_grad():
            token = int(forward(model, pad([ids], model))[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
        yield Progress("answer", i + 1, length)
    return model.decode(ids[start:])
