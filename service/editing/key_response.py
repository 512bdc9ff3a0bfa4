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
from service.kit.stated_fact import StatedFact
from service.kit.steps import Phase, Progress, Stepper
from service.methods.parameters import Parameters
from service.methods.registry import get_method
from service.models.loading import LoadedModel
from service.models.scoring import SCORING_BATCH_SIZE
from service.models.token_batch import tokenize_statement
from service.weights.factors import Association, EditUpdate


class KeyResponse:
    """The responses of other keys to an edit of one subject, in the lowest edited layer."""

    def __init__(
        self, model: LoadedModel, fact: StatedFact, layer: int, direction: Tensor, tokens_after: int
    ) -> None:
        self._model, self._fact, self.layer, self._tokens_after = model, fact, layer, tokens_after
        self._direction = direction.double().cpu()  #: C^-1 k, or k where the method needs no C

    @classmethod
    def build(
        cls, context: EditorContext, method: str, parameters: Parameters, fact: StatedFact
    ) -> Stepper[KeyResponse]:
        """Compute the key of the fact's subject, on the base model."""
        layer = min(parameters.layers)
        tokens_after = yield from choose_subject_token(context.model, fact.statement(), parameters)
        (key,) = yield from _subject_keys(context.model, fact, [fact.subject], layer, tokens_after)
        if get_method(method).needs_covariance:
            statistics = yield from context.get_statistics([layer])
            key = statistics[layer].solve(key)
        return cls(context.model, fact, layer, key, tokens_after)

    def rank_subjects(self, subjects: Sequence[str]) -> Stepper[list[str]]:
        """Return subjects by the response of their keys in the same statement, the greatest first."""
        if not subjects:
            return []
        keys = yield from _subject_keys(self._model, self._fact, subjects, self.layer, self._tokens_after)
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
    model: LoadedModel, fact: StatedFact, subjects: Sequence[str], layer: int, tokens_after: int
) -> Stepper[Tensor]:
    """Return the keys (n, D) of subjects in the statement of a fact, each at the token that is edited of the edit's
    subject."""
    keys: list[Tensor] = []
    for start in range(0, len(subjects), SCORING_BATCH_SIZE):
        batch = subjects[start : start + SCORING_BATCH_SIZE]
        statements = [fact.statement(subject) for subject in batch]
        beginnings = [tokenize_statement(model, s, tokens_after).through_subject() for s in statements]
        with torch.no_grad():
            keys.append(forward_activations(model, beginnings, [layer], (), None).keys[layer])
        yield Progress(Phase.ANSWER, start + len(batch), len(subjects))
    return torch.cat(keys)
