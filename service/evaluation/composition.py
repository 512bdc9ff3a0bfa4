"""How a sequence of edits becomes one set of weights: composed jointly, as the service does, or added one by one, as
published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from service.engine.versioned_model import VersionedModel
from service.evaluation.checkpointing import ArtifactKind, StageKind
from service.evaluation.edit_search import FoundEdit, find_group
from service.evaluation.evaluation_context import EvaluationContext
from service.evaluation.strengths import choose_group_strengths
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.patches.patch import BASE, PatchSet, weights_patch
from service.weights.composition import apply_delta, compose
from service.weights.factors import EditUpdate


class SequenceComposition(Protocol):
    """The weights after a growing number of edits."""

    edit_details: list[
        dict[str, Any]
    ]  #: of every active edit: loss and steps of its search, and its strength

    def checkpoints(self) -> list[int]:
        """Return the numbers of edits after which the model is measured."""

    def advance_to(self, count: int) -> Stepper[PatchSet]:
        """Return the weights with the first `count` edits active. `count` must not decrease."""

    def compose_only(self, numbers: Sequence[int]) -> Stepper[PatchSet | None]:
        """Return the weights with only these of the active edits, as after reverts of the others; None where an edit
        cannot be reverted by itself."""


class JointComposition:
    """Edits found on the base model, all active ones composed in closed form.

    The edits of a group become active together, each with the strength that the service's policy chooses.
    """

    def __init__(self, evaluation: EvaluationContext) -> None:
        self.evaluation = evaluation
        self.edit_details: list[dict[str, Any]] = []
        self._groups: list[list[EditUpdate]] = []  # the updates of each active edit

    @property
    def _active(self) -> list[EditUpdate]:
        return [u for group in self._groups for u in group]

    def checkpoints(self) -> list[int]:
        return _checkpoint_counts(self.evaluation, 1)

    def advance_to(self, count: int) -> Stepper[PatchSet]:
        """Return the weights with the first `count` edits active. A checkpoint within a group splits it in two."""
        evaluation = self.evaluation
        while len(self.edit_details) < count:
            first = len(self.edit_details)
            group_index, offset = divmod(first, evaluation.batch_size)
            group = yield from find_group(evaluation, group_index, BASE)
            edits = group[offset : count - group_index * evaluation.batch_size]
            stage = evaluation.stages.run_once(
                ArtifactKind.STRENGTHS.name_of(first, count),
                StageKind.STRENGTH,
                self._choose_strengths(first, edits),
            )
            progress = Progress(Phase.STRENGTHEN, first, len(evaluation.records))
            strengths = yield from report_as(stage, progress)
            for edit, strength in zip(edits, strengths, strict=True):
                self._groups.append([u.scaled(strength) for u in edit.updates])
                self.edit_details.append(edit.search | {"strength": strength})
        yield Progress(Phase.COMPOSE, count, count)
        return (yield from evaluation.replica.compose_patch_in_steps(self._active))

    def compose_only(self, numbers: Sequence[int]) -> Stepper[PatchSet | None]:
        updates = [u for number in numbers for u in self._groups[number]]
        return (yield from self.evaluation.replica.compose_patch_in_steps(updates))

    def _choose_strengths(self, first: int, edits: Sequence[FoundEdit]) -> Stepper[list[float]]:
        """Return the strengths of some edits beside the active ones."""
        evaluation = self.evaluation
        if len(evaluation.plan.strengths) == 1 or evaluation.plan.objective != "write":
            return [evaluation.strength_schedule(first + len(edits)).strengths[0]] * len(edits)
        records = evaluation.records[first : first + len(edits)]
        updates = [edit.updates for edit in edits]
        return (
            yield from choose_group_strengths(
                evaluation.replica, records, updates, self._active, first, evaluation.strength_schedule
            )
        )


class SequentialUpdates:
    """Each edit found on the model that the edits before it left, and its update added to those weights."""

    def __init__(self, evaluation: EvaluationContext) -> None:
        self.evaluation = evaluation
        self.edit_details: list[dict[str, Any]] = []
        self._patch: PatchSet = BASE

    def checkpoints(self) -> list[int]:
        return _checkpoint_counts(self.evaluation, self.evaluation.batch_size)

    def advance_to(self, count: int) -> Stepper[PatchSet]:
        evaluation, strength = self.evaluation, self.evaluation.plan.strengths[0]
        while len(self.edit_details) < count:
            group_index = len(self.edit_details) // evaluation.batch_size
            group = yield from find_group(evaluation, group_index, self._patch)
            updates = [u.scaled(strength) for edit in group for u in edit.updates]
            self._patch = add_updates(evaluation.replica, self._patch, updates)
            self.edit_details += [edit.search | {"strength": strength} for edit in group]
        return self._patch

    def compose_only(self, numbers: Sequence[int]) -> Stepper[PatchSet | None]:
        yield from ()
        return None


def add_updates(replica: VersionedModel, patch: PatchSet, updates: Sequence[EditUpdate]) -> PatchSet:
    """Return the weights plus the change that these updates alone amount to."""
    conv1d = replica.base.architecture.conv1d
    with replica.use_patch(patch) as model:
        updated = {
            s: apply_delta(model.parameter(s).data, change, conv1d) for s, change in compose(updates).items()
        }
    return weights_patch({**patch.weights, **updated})


def _checkpoint_counts(evaluation: EvaluationContext, multiple: int) -> list[int]:
    """Return the plan's checkpoints, each rounded up to a multiple, and the number of all edits."""
    total = len(evaluation.records)
    counts = {math.ceil(c / multiple) * multiple for c in evaluation.plan.checkpoints}
    return sorted({min(c, total) for c in counts if c < total + multiple} | {total})
