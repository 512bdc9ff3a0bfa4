"""The edits of an evaluation: found in groups, and stored with their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from service.datasets.record import target_object
from service.editing.context import EditInput
from service.evaluation.checkpointing import ArtifactKind, StageKind
from service.evaluation.evaluation_context import EvaluationContext
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.text import normalize_whitespace
from service.patches.patch import PatchSet
from service.weights.factors import EditUpdate, deserialize_updates, serialize_updates


class FoundEdit(NamedTuple):
    """One edit: its updates at strength 1, and the last loss and the number of steps of its search."""

    updates: list[EditUpdate]
    search: dict[str, Any]


def find_group(evaluation: EvaluationContext, group_index: int, patch: PatchSet) -> Stepper[list[FoundEdit]]:
    """Find the edits of one group of records on the model with these weights, or load them."""
    records, stages = evaluation.records, evaluation.stages
    first = group_index * evaluation.batch_size
    indices = range(first, min(first + evaluation.batch_size, len(records)))
    stage = stages.run_once(
        ArtifactKind.SEARCH.name_of(group_index),
        StageKind.FIND,
        evaluation.replica.step_with_patch(patch, _find_and_store(evaluation, indices)),
    )
    yield from evaluation.editor.get_gate_reference(evaluation.parameters)
    searches = yield from report_as(stage, Progress(Phase.FIND, first, len(records)))
    group = []
    for i, search in zip(indices, searches, strict=True):
        data = stages.store.get(ArtifactKind.FACTORS.name_of(i))
        assert data is not None
        updates = deserialize_updates(
            data, _edit_id(i), normalize_whitespace(records[i].subject), evaluation.editor.find_shared
        )
        group.append(FoundEdit(updates, search))
    return group


def _find_and_store(evaluation: EvaluationContext, indices: Sequence[int]) -> Stepper[list[dict[str, Any]]]:
    """Find edits on the current weights, store their tensors, and return the outcome of each search."""
    inputs = [_edit_input(evaluation, i) for i in indices]
    factors = yield from evaluation.editor.find_all_factors(inputs)
    for i, edit_factors in zip(indices, factors, strict=True):
        evaluation.stages.store.put(ArtifactKind.FACTORS.name_of(i), serialize_updates(edit_factors.updates))
    return [{"loss": f.losses[-1] if f.losses else None, "steps": len(f.losses)} for f in factors]


def _edit_input(evaluation: EvaluationContext, i: int) -> EditInput:
    record, plan = evaluation.records[i], evaluation.plan
    statement, target = record.statement, target_object(record, plan.objective)
    return EditInput(statement, target, plan.method, plan.hparams, _edit_id(i), plan.objective)


def _edit_id(i: int) -> str:
    """Return the id of an edit. Ids sort like the records."""
    return f"{i:06}"
