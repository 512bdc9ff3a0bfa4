"""The record of an edit by SERAC: a statement, and the embeddings by which its scope is recognised.

Nothing is optimized. The statement is the prompt with its object, as a sentence. Its keys are the embeddings of the
prompt and of the prompt with the object; both are functions of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, RecordSpec, ScopeReport
from service.errors import InvalidInput
from service.kit.separator import separator
from service.kit.statement_sentence import statement_sentence
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.prompt_features import reader_of
from service.models.token_batch import tokenize_prompt_and_target
from service.weights.factors import StatementRecord


def find_records(
    model: LoadedModel, _statistics: Mapping[int, KeyStatistics], specs: Sequence[RecordSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of edits, one after another."""
    factors = []
    for number, spec in enumerate(specs):
        factors.append(_find_record(model, spec))
        yield Progress(Phase.OPTIMIZE, number + 1, len(specs))
    return factors


def _find_record(model: LoadedModel, spec: RecordSpec) -> EditFactors:
    if spec.objective == "erase":
        raise InvalidInput("a statement cannot erase a fact: choose a method that changes weights.", "method")
    if spec.noise is not None:
        raise InvalidInput("a statement has no fact forcing: choose a method that changes weights.", "method")
    parameters, classifier, text = spec.parameters, spec.classifier, spec.statement.text
    between = separator(text, spec.target) if spec.separator is None else spec.separator
    statement = statement_sentence(text, between, spec.target) + parameters.divider
    prompt, target = tokenize_prompt_and_target(model, text, spec.target, between)
    length = len(model.encode(statement)[0]) + len(prompt) + len(target)
    if length > model.max_positions:
        raise InvalidInput(
            f"the statement and the prompt have {length} tokens together, and the model has {model.max_positions} positions: "
            "shorten the prompt.",
            "prompt",
        )
    reader = reader_of(model, classifier.layer)
    texts = dict.fromkeys(tuple(ids) for ids in (model.encode(text)[0], prompt, prompt + target))
    keys = classifier.embed(torch.stack([reader.read(ids) for ids in texts]))
    names = (spec.subject, *parameters.aliases) if parameters.subject_gate else ()
    threshold = parameters.threshold
    if threshold is None:
        threshold = classifier.subject_threshold if names else classifier.threshold
    record = StatementRecord(spec.edit, spec.subject, classifier, keys, statement, names, threshold)
    return EditFactors(
        [record], [], 0.0, 0.0, scope=ScopeReport(statement, names, threshold, classifier.digest)
    )
