"""From an edit that is wanted to its pieces: every method behind one door.

Nothing here or below touches a weight of the model for longer than a step: the answer is a list of pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditSpec, FineTuneSpec, ValueEditSpec, build_edit_spec
from service.editing.methods.finetune import fine_tune
from service.editing.methods.rome import EditFactors, find_associations
from service.kit.steps import Stepper
from service.kit.text import Statement
from service.models.loading import LoadedModel
from service.recipes.recipe import Parameters
from service.schemas import Objective


def find_batch_factors(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], specs: Sequence[EditSpec]
) -> Stepper[list[EditFactors]]:
    """The pieces of a batch of edits (`wanted.batches`), each as it would be found alone."""
    value_specs = [e for e in specs if isinstance(e, ValueEditSpec)]
    factors = (yield from find_associations(model, statistics, value_specs)) if value_specs else []
    for e in specs:  # a batch is either searched for or trained
        if isinstance(e, FineTuneSpec):
            factors.append((yield from fine_tune(model, e)))
    return factors


def find_factors(
    model: LoadedModel,
    statistics: Mapping[int, KeyStatistics],
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = "rome",
    objective: Objective = "write",
    noise: Tensor | None = None,
) -> Stepper[EditFactors]:
    """The pieces of one edit."""
    spec = build_edit_spec(model, contexts, statement, target, parameters, edit, method, objective, noise)
    (factors,) = yield from find_batch_factors(model, statistics, [spec])
    return factors
