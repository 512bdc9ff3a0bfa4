"""The factors of edits, computed on the base model by the implementation that the method's descriptor names.

An implementation changes the weights of the model only within a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from torch import Tensor

from service.covariance.gradient_statistics import GradientStatistics
from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, EditSpec, build_edit_spec
from service.editing.subject_token import choose_subject_token
from service.kit.steps import Stepper
from service.kit.text import Statement
from service.methods.parameters import Parameters
from service.methods.registry import DEFAULT_METHOD, get_method
from service.models.loading import LoadedModel
from service.schemas import Objective


def find_batch_factors(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], specs: Sequence[EditSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of a batch of edits (`batch_edit_specs`), each as it would be alone."""
    if not specs:
        return []
    (implementation,) = {get_method(spec.method).implementation for spec in specs}
    module, _, function = implementation.partition(":")
    factors: list[EditFactors] = yield from getattr(import_module(module), function)(model, statistics, specs)
    return factors


def find_factors(
    model: LoadedModel,
    statistics: Mapping[int, KeyStatistics],
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = DEFAULT_METHOD,
    objective: Objective = "write",
    noise: Tensor | None = None,
    gradient_statistics: Mapping[int, GradientStatistics] | None = None,
) -> Stepper[EditFactors]:
    """Return the factors of one edit."""
    tokens_after = yield from choose_subject_token(model, statement, parameters)
    spec = build_edit_spec(
        model,
        contexts,
        statement,
        target,
        parameters,
        edit,
        method,
        objective,
        noise,
        tokens_after=tokens_after,
        gradient_statistics=gradient_statistics,
    )
    (factors,) = yield from find_batch_factors(model, statistics, [spec])
    return factors
