"""The separator between a prompt and its object that a model prefers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.errors import InvalidInput
from service.kit.separator import Separator, separator
from service.kit.steps import Phase, Stepper
from service.models.loading import LoadedModel
from service.models.scoring import score_targets


def choose_separator(
    model: LoadedModel, prompt: str, objects: Sequence[str], given: Separator | None = None
) -> Stepper[Separator]:
    """Return the separator of a prompt and some objects that compete there: one for all of them.

    It is the given one, or the certain one. Elsewhere the model decides with its current weights: the separator is
    the one with which the objects together are more probable.
    """
    candidates = _common_separators(model, prompt, objects, given)
    if len(candidates) == 1:
        return candidates[0]
    pairs = [(prompt, name) for _ in candidates for name in objects]
    separators = [candidate for candidate in candidates for _ in objects]
    scores = yield from score_targets(model, pairs, Phase.ANSWER, separators)
    total: dict[Separator, float] = dict.fromkeys(candidates, 0.0)
    for candidate, score in zip(separators, scores, strict=True):
        total[candidate] += math.exp(score.log_p * score.num_tokens)
    return max(candidates, key=lambda candidate: total[candidate])


def _common_separators(
    model: LoadedModel, prompt: str, objects: Sequence[str], given: Separator | None
) -> list[Separator]:
    """Return the separators that every object can have; those of the first object if there is none."""
    usable: list[list[Separator]] = []
    for name in objects:
        try:
            usable.append(model.text_encoder.usable_separators(prompt, name, given))
        except InvalidInput:  # an answer that the model's tokenizer spells in another way
            continue
    if not usable:
        return [separator(prompt, objects[0]) if given is None else given]
    common = [candidate for candidate in usable[0] if all(candidate in others for others in usable)]
    return common or usable[0]
