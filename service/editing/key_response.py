"""Which subjects respond most to an edit of another subject, before the edit is computed.

An edit at key k adds delta (k'^T C^-1 k) / (k^T C^-1 k) to the value at another key k' (ROME, Meng et al. 2022, Eq. 2).
So the subjects with the greatest |k'^T C^-1 k| are those whose answers the edit can change most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.editing.associations import forward_activations
from service.editing.context import EditorContext
from service.editing.subject_token import choose_subject_token
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import fill_prompt
from service.methods.parameters import Parameters
from service.methods.registry import get_method
from service.models.loading import LoadedModel
from service.models.scoring import SCORING_BATCH_SIZE
from service.models.token_batch import tokenize_statement
from service.weights.factors import Association, EditUpdate


class KeyResponse:
    """The responses of other keys to an edit of one subject, in the lowest edited layer."""

    def __init__(
        self, model: LoadedModel, prompt: str, layer: int, direction: Tensor, tokens_after: int
    ) -> None:
        self._model, self._prompt, self.layer, self._tokens_after = model, prompt, layer, tokens_after
        self._direction = direction.double().cpu()  #: C^-1 k, or k where the method needs no C

    @classmethod
    def build(
        cls, context: EditorContext, method: str, parameters: Parameters, prompt: str, subject: str
    ) -> Stepper[KeyResponse]:
        """Compute the key of the subject in the prompt, on the base model."""
        layer = min(parameters.layers)
        statement = fill_prompt(prompt, subject)
        tokens_after = yield from choose_subject_token(context.model, statement, parameters)
        (key,) = yield from _subject_keys(context.model, prompt, [subject], layer, tokens_after)
        if get_method(method).needs_covariance:
            statistics = yield from context.get_statistics([layer])
            key = statistics[layer].solve(key)
        return cls(context.model, prompt, layer, key, tokens_after)

    def rank_subjects(self, subjects: Sequence[str]) -> Stepper[list[str]]:
        """Return subjects by the response of their keys in the same prompt, the greatest first."""
        if not subjects:
            return []
        keys = yield from _subject_keys(self._model, self._prompt, subjects, self.layer, self._tokens_after)
        order = self._responses(keys).sort(descending=True, stable=True).indices
        return [subjects[i] for i in order.tolist()]

    def rank_edits(self, updates: Mapping[str, Sequence[EditUpdate]]) -> list[str]:
        """Return the active edits with a key in this layer, those with the greatest response first."""
        keys = {
            edit: update.key
            for edit, group in updates.items()
            for update in group
            if isinstance(update, Association) and update.layer == self.layer
        }
        if not keys:
            return []
        order = self._responses(torch.stack(list(keys.values()))).sort(descending=True, stable=True).indices
        return [list(keys)[i] for i in order.tolist()]

    def _responses(self, keys: Tensor) -> Tensor:
        """Return the responses (n,) of keys (n, D)."""
        return (keys.double().cpu() @ self._direction).abs()


def _subject_keys(
    model: LoadedModel, prompt: str, subjects: Sequence[str], layer: int, tokens_after: int
) -> Stepper[Tensor]:
    """Return the keys (n, D) of subjects in a prompt, each at the token that is edited of the edit's subject."""
    keys: list[Tensor] = []
    for start in range(0, len(subjects), SCORING_BATCH_SIZE):
        batch = subjects[start : start + SCORING_BATCH_SIZE]
        statements = [fill_prompt(prompt, subject) for subject in batch]
        beginnings = [tokenize_statement(model, s, tokens_after).through_subject() for s in statements]
        with torch.no_grad():
            keys.append(forward_activations(model, beginnings, [layer], (), None).keys[layer])
        yield Progress(Phase.ANSWER, start + len(batch), len(subjects))
    return torch.cat(keys)
