"""What a model says when the subject is noised: one fixed draw, and the most probable tokens (methods F.1, F.4 (2), (3))."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from service.datasets.records import Record
from service.editing.subject_noise import whole
from service.errors import InvalidInput
from service.evaluation.metrics import ask
from service.kit.steps import Progress, Steps, finish
from service.kit.text import Statement, fill, find
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.score import Score
from service.models.scoring import score_steps
from service.models.token_batch import Tokens, forward, pad, prompt_and_target, tokens
from service.tracing.noise import Level, draw


def noise_of(model: LoadedModel, record: Record, level: Level, seed: int) -> Tensor:
    """(n, d) in fp64: what is added to the embeddings of the subject's n tokens, whenever it is noised."""
    begin, end = tokens(model, fill(record.prompt, record.subject)).subject
    return level.value * draw(1, end - begin, model.width, seed)[0]


def noised_answer(model: LoadedModel, record: Record, noise: Tensor) -> str:
    """The greedy continuation of the prompt under noise, as long as the true object is."""
    prompt = tokens(model, fill(record.prompt, record.subject))
    _, true = prompt_and_target(model, record.text, record.target_true or record.target_new)
    said: list[int] = []
    for _ in true[: model.positions - len(prompt.ids)]:
        with torch.no_grad(), _noised(model, prompt, noise):
            logits = forward(model, pad([prompt.ids + said], model), 1)
        said.append(int(logits[0, -1].argmax()))
    return model.decode(said)


def noised_score_steps(model: LoadedModel, record: Record, noise: Tensor) -> Steps[list[Score]]:
    """The scores of what is asked about a record, its subject noised wherever a prompt names it; neighbours are other subjects."""
    pairs = ask(record)
    about = len(pairs) - 2 * len(record.neighbours)
    scores: list[Score] = []
    for prompt, target in pairs[:about]:
        named = _naming(record, prompt)
        if named is None:
            scores += yield from score_steps(model, [(prompt, target)])
            continue
        with _noised(model, tokens(model, named), noise):  # one row: no padding moves the subject
            scores += finish(score_steps(model, [(prompt, target)]))
        yield Progress("measure", len(scores), len(pairs))
    return scores + (yield from score_steps(model, pairs[about:]))


def _naming(record: Record, prompt: str) -> Statement | None:
    """Where a prompt names the subject, if it does."""
    if prompt == record.text:
        return fill(record.prompt, record.subject)
    try:
        return find(prompt, record.subject)
    except InvalidInput:
        return None


def _noised(model: LoadedModel, text: Tokens, noise: Tensor) -> AbstractContextManager[None]:
    """Within the block, one row that begins with this text has its subject noised."""
    change = whole([text], [noise])
    assert change is not None
    return replace(model.embedding, change)
