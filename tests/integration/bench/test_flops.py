"""bench/flops.py: counted operations equal the formulas, and no implementation is below the bound."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench.flops import TokenCost, avoided_fraction, count_flops, edit_bound, trace_bound
from service.covariance.second_moment import KeyStatistics
from service.editing.find_factors import find_factors
from service.editing.tokenized_contexts import tokenize_contexts
from service.kit.steps import run_to_completion
from service.kit.text import Statement, fill_prompt, locate_subject
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.tracing.fast_trace import trace_statement
from service.tracing.interventions import list_cells
from service.tracing.reference import TRACE_KINDS, trace_reference
from service.tracing.trace_input import build_trace_input
from tests.support.tiny_models import tiny

STATEMENT = locate_subject("In The Eiffel Tower is in", "Eiffel Tower")
SAMPLES = 2


@pytest.fixture(params=["gpt2", "gptj"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny(request.param, layers=4, inner=64)


def test_a_full_pass_costs_what_the_formula_says(model: LoadedModel) -> None:
    """A full pass costs all matrices of all blocks, the attention and the head for every token."""
    ids = model.encode(STATEMENT.text)[0]
    cost, size = TokenCost.from_model(model), len(ids)
    each = cost.layers * (cost.block + 4 * cost.width * size) + cost.head
    assert count_flops(lambda: forward(model, pad([ids] * 2, model)))[1] == 2 * size * each


def trace_flops(model: LoadedModel, kinds: tuple[str, ...], severed: bool) -> tuple[int, int, int]:
    """Return the operations of full passes, of our tracer, and the bound."""
    options: dict[str, Any] = {
        "kinds": kinds,
        "severed": severed,
        "samples": SAMPLES,
        "noise": 0.5,
        "window": 2,
    }
    question = build_trace_input(model, STATEMENT, None, SAMPLES, 0.5, 1, None, ())
    cells = list_cells(question, kinds, 2, severed, model.num_layers)
    bound = trace_bound(TokenCost.from_model(model), question, cells, model.architecture.parallel)
    _, full = count_flops(lambda: run_to_completion(trace_reference(model, STATEMENT, **options)))
    _, ours = count_flops(lambda: run_to_completion(trace_statement(model, STATEMENT, **options)))
    return full, ours, bound


@pytest.mark.parametrize(
    ("kinds", "severed"), [*(((kind,), False) for kind in TRACE_KINDS), (TRACE_KINDS, False), ((), True)]
)
def test_no_trace_beats_its_bound(model: LoadedModel, kinds: tuple[str, ...], severed: bool) -> None:
    """A trace costs at least the bound and less than full passes, for every kind."""
    full, ours, bound = trace_flops(model, kinds, severed)
    assert bound <= ours < full


def test_the_hidden_map_is_counted_as_on_paper() -> None:
    """In addition to the runs, the bound of the hidden map has the keys and values of R N(N+1)/2 L(L-1)/2
    tokens in a layer."""
    model = tiny("gpt2", layers=4, inner=64)
    question = build_trace_input(model, STATEMENT, None, SAMPLES, 0.5, 1, None, ())
    cost = KeyValueCost(model.num_layers, model.hidden_size, model.intermediate_size, 320)
    cells = list_cells(question, ("hidden",), 2, False, cost.layers)
    swept = trace_bound(cost, question, cells) - trace_bound(cost, question, [])
    n = question.prompt_length - question.subject[0]
    assert swept == cost.key_value * SAMPLES * (n * (n + 1) // 2) * (cost.layers * (cost.layers - 1) // 2)


class KeyValueCost(TokenCost):
    """A cost model that counts only keys and values."""

    query_output = mlp = head = 0

    def attention(self, first: int, count: int) -> int:
        return 0


def statistics(model: LoadedModel, layer: int) -> KeyStatistics:
    return KeyStatistics(layer, torch.eye(model.intermediate_size, dtype=torch.float64), 1, 0.0, "")


@pytest.mark.parametrize("prompt", ["{} is in the city of", "In the city of {}"])
def test_no_edit_beats_its_bound(model: LoadedModel, prompt: str) -> None:
    """An edit costs at least the bound and less than the same number of full passes."""
    steps, layer, contexts = 3, 1, ["The Colosseum", "Big Ben can"]
    parameters = RomeParameters(layers=(layer,), steps=steps, stop_loss=0)
    statement: Statement = fill_prompt(prompt, "Eiffel Tower")
    compute_edit = partial(
        find_factors, model, {layer: statistics(model, layer)}, contexts, statement, "Rome", parameters
    )
    factors, ours = count_flops(lambda: run_to_completion(compute_edit()))
    texts = tokenize_contexts(model, statement, "Rome", contexts)
    full = count_flops(lambda: forward(model, pad([t.ids for t in texts.texts()], model)))[1]
    assert len(factors.losses) == steps
    assert edit_bound(TokenCost.from_model(model), texts, layer, steps) <= ours < (2 * steps + 1) * full


def test_every_further_step_of_an_edit_costs_the_same() -> None:
    """Every further step of an edit adds the same number of operations to the bound."""
    model = tiny("gpt2")
    texts = tokenize_contexts(model, fill_prompt("{} is in", "Big Ben"), "Rome", ["The Colosseum"])
    bounds = [edit_bound(TokenCost.from_model(model), texts, 1, steps) for steps in (1, 2, 3)]
    assert bounds[2] - bounds[1] == bounds[1] - bounds[0] > 0


def test_avoided_fraction() -> None:
    """The avoided fraction is 0 at the cost of full passes, 0.5 halfway to the bound, and 1 at the bound."""
    assert [avoided_fraction(10, ours, 4) for ours in (10, 7, 4)] == [0, 0.5, 1]
