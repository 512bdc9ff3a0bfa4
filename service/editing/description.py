"""How much a version changes the description of a subject: the KL divergence along the base model's own description.

The base model describes the subject greedily: in a conversation after "Tell me about S.", or, without a chat template,
after "A sentence about S:". The measure of a version is the mean over the tokens of this description of KL(p_base ||
p_version), the divergence of the distributions from which the token is taken, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.editing.greedy_text import generate_greedy
from service.editing.restatement import PLAIN_INTRODUCTION
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import forward, pad
from service.patches.patch import PatchSet

DESCRIPTION_TOKENS = 16
ROWS_PER_STEP = 8  # descriptions whose distributions are computed together


@dataclass(frozen=True)
class Description:
    """A prompt and the base model's description after it, as tokens."""

    prompt: str
    ids: list[int]  #: without the last token of the description, which predicts nothing of it
    predicted: int  #: the distributions at the last so many positions are compared


def description_prompt(model: LoadedModel, subject: str) -> str:
    """Return the text after which a model describes a subject."""
    if model.chat_format is not None:
        try:
            return model.chat_format.prompt_text([{"role": "user", "content": f"Tell me about {subject}."}])
        except InvalidInput:  # the template refuses the question
            pass
    return f"{PLAIN_INTRODUCTION}{subject}:"


def describe_subjects(model: LoadedModel, subjects: Sequence[str]) -> Stepper[list[Description | None]]:
    """Return the base model's descriptions; None for a subject whose prompt fills all positions of the model."""
    prompts = [description_prompt(model, subject) for subject in subjects]
    texts = yield from generate_greedy(model, prompts, DESCRIPTION_TOKENS)
    return [
        _tokenize_description(model, prompt, text.text) for prompt, text in zip(prompts, texts, strict=True)
    ]


def _tokenize_description(model: LoadedModel, prompt: str, text: str) -> Description | None:
    try:
        ids, offsets = model.encode(prompt + text)
    except InvalidInput:
        return None
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    if not 0 < start < model.max_positions:
        return None
    ids = ids[: max(start, min(len(ids), model.max_positions) - 1)]
    return Description(prompt, ids, len(ids) - start + 1)


def measure_descriptions(
    replica: VersionedModel, patch: PatchSet, descriptions: Sequence[Description | None]
) -> Stepper[list[float | None]]:
    """Return the mean divergence of each description from the base model to a version with these patches."""
    known = [d for d in descriptions if d is not None]
    divergences = [] if patch.patches else [0.0] * len(known)
    while len(divergences) < len(known):
        divergences += _divergences(replica, patch, known[len(divergences) :][:ROWS_PER_STEP])
        yield Progress(Phase.DRIFT, len(divergences), len(known))
    measured = iter(divergences)
    return [None if d is None else next(measured) for d in descriptions]


def _divergences(
    replica: VersionedModel, patch: PatchSet, descriptions: Sequence[Description]
) -> list[float]:
    model = replica.base
    batch = pad([d.ids for d in descriptions], model, side="left")
    read = max(d.predicted for d in descriptions)

    def log_probs() -> Tensor:
        return at_least_fp32(forward(model, batch, last=read)).log_softmax(-1)

    with torch.no_grad():
        base = log_probs()
        with replica.use_patch(patch):
            changed = log_probs()
        divergence = (base.exp() * (base - changed)).sum(-1).double()
    return [float(row[-d.predicted :].mean()) for row, d in zip(divergence, descriptions, strict=True)]
