"""What a model says when the subject is noised: one fixed draw, and the most probable tokens (methods F.1, F.4 (2), (3))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from service.evaluation.records import Record
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.prompts import forward, pad, prompt_and_target, tokens
from service.text import Span, fill
from service.tracing.noise import Level, corrupt, draw


@contextmanager
def noised(model: LoadedModel, subject: Span, level: Level, seed: int) -> Iterator[None]:
    """Within the block, the subject's tokens [b, e) of every row carry the noise that a seed draws."""
    noise = level.value * draw(1, subject[1] - subject[0], model.width, seed)

    def disturb(embedded: Tensor) -> Tensor:
        return corrupt(embedded, subject, noise.to(embedded.device))

    with replace(model.embedding, disturb):
        yield


def noised_answer(model: LoadedModel, record: Record, level: Level, seed: int) -> str:
    """The greedy continuation of the prompt under noise, as long as the true object is."""
    prompt = tokens(model, fill(record.prompt, record.subject))
    _, true = prompt_and_target(model, record.text, record.target_true or record.target_new)
    ids = list(prompt.ids)
    with torch.no_grad(), noised(model, prompt.subject, level, seed):
        for _ in true[: model.positions - len(ids)]:
            ids.append(int(forward(model, pad([ids], model), 1)[0, -1].argmax()))
    return model.decode(ids[len(prompt.ids) :])
