"""Which token of its subject an edit changes: the last one, the first one, or the one at which a causal trace peaks.

The traced token is the one whose MLP output, restored at the edited layers, brings back most of the probability of the
model's own next token after the prompt (Meng et al. 2022, section 2). The noise is drawn with the seed of the edit's
contexts, so that a repetition chooses the same token.

A subject can have other tokens after a context, in a restatement or by itself than in the prompt. The traced token is
therefore counted from the subject's end, where the tokenizations agree.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from service.kit.steps import Stepper
from service.kit.text import Statement
from service.methods.parameters import Parameters, RomeParameters
from service.models.loading import LoadedModel
from service.models.token_batch import TokenizedStatement, tokenize_statement
from service.tracing.fast_trace import FastTracer
from service.tracing.interventions import restored_cell
from service.tracing.trace_input import build_trace_input

LAST, FIRST = 0, sys.maxsize  #: the subject's tokens after the edited one (`TokenizedStatement.tokens_after`)
SAMPLES, NOISE = 10, "3sigma"  #: of the trace, as published


@dataclass(frozen=True)
class SubjectToken:
    """The edited token of a subject in the prompt of its edit."""

    position: int  #: in the prompt, from 0
    text: str

    @classmethod
    def of(cls, model: LoadedModel, prompt: TokenizedStatement) -> SubjectToken:
        """Return the edited token of a prompt."""
        return cls(prompt.edited_index, model.token_text(prompt.ids[prompt.edited_index]))


def choose_subject_token(model: LoadedModel, statement: Statement, parameters: Parameters) -> Stepper[int]:
    """Return the number of the subject's tokens after the edited one. Fine-tuning edits no single token."""
    if not isinstance(parameters, RomeParameters) or parameters.subject_token == "last":
        return LAST
    if parameters.subject_token == "first":
        return FIRST
    begin, end = tokenize_statement(model, statement).subject
    if end - begin == 1:
        return LAST
    effects = yield from trace_subject(model, statement, parameters.layers, parameters.seed)
    return len(effects) - 1 - max(range(len(effects)), key=lambda i: (effects[i], i))


def trace_subject(
    model: LoadedModel, statement: Statement, layers: tuple[int, ...], seed: int
) -> Stepper[list[float]]:
    """Return the probability of the model's next token for each token of the subject, with noise on the subject and
    the MLP outputs of this token restored from the first to the last of the layers."""
    trace_input = build_trace_input(model, statement, None, SAMPLES, NOISE, seed, None, ())
    first, window = min(layers), max(layers) - min(layers) + 1
    cells = [
        restored_cell("mlp", token, first + window // 2, window, model.num_layers)
        for token in range(*trace_input.subject)
    ]
    tracer = FastTracer(model, trace_input, cells)
    yield from tracer.compute_base_runs()
    scores = yield from tracer.score_cells()
    return [scores[cell.key] for cell in cells]
