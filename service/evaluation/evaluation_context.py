"""What all parts of one evaluation share: the model, the plan, the records and the stored stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.datasets.record import Record
from service.editing.context import EditorContext
from service.engine.versioned_model import VersionedModel
from service.evaluation.checkpointing import StageCache
from service.methods.parameters import Parameters
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.schemas import EvaluationPlan

EDITS_PER_BATCH = 16  # edits whose searches run as one batch


@dataclass(frozen=True)
class EvaluationContext:
    """The inputs of one evaluation. Every record fits the model."""

    replica: VersionedModel
    editor: EditorContext
    plan: EvaluationPlan
    parameters: Parameters  #: the plan's hyperparameters, resolved
    records: Sequence[Record]
    damage_texts: Sequence[str]
    stages: StageCache
    other_facts: Sequence[Record] = ()  #: facts that are not edited, on which recall is measured

    @property
    def batch_size(self) -> int:
        """Return how many edits are searched at once. On the edited model the default is one, as published."""
        return self.plan.batch_size or (EDITS_PER_BATCH if self.plan.search_model == "base" else 1)

    def strength_schedule(self, active: int) -> StrengthSchedule:
        """Return the strengths to try, with the margin that each requires, when `active` edits are active."""
        width = self.replica.base.intermediate_size
        return strength_schedule(self.parameters, self.plan.strengths, active, width)
