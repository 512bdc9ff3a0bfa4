"""Operations are counted as the formulas say, and nothing does less than the least."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.flops import Cost, avoided, counted, edit_bound, trace_bound
from service.covariance.second_moment import Statistics
from service.editing.methods.registry import find_steps
from service.editing.value_optimizer import rows
from service.kit.steps import finish
from service.kit.text import Statement, fill, find
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.recipes.recipe import RomeParameters
from service.tracing.fast_trace import trace_steps
from service.tracing.interventions import cells_of
from service.tracing.reference import KINDS, oracle_steps
from service.tracing.trace_input import ask
from tests.support.tiny_models import tiny

STATEMENT = find("In The Eiffel Tower is in", "Eiffel Tower")
SAMPLES = 3


@pytest.fixture(params=["gpt2", "gptj"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny(request.param, layers=4, inner=64)


def test_a_full_pass_costs_what_the_formula_says(model: LoadedModel) -> None:
    """Of every token: all matrices of all blocks, its look at all tokens, and the head."""
    ids = model.encode(STATEMENT.text)[0]
    cost, size = Cost.of(model), len(ids)
    each = cost.layers * (cost.block + 4 * cost.width * size) + cost.head
    assert counted(lambda: forward(model, pad([ids] * 2, model)))[1] == 2 * size * each


def trace_work(model: LoadedModel, kinds: tuple[str, ...], severed: bool) -> tuple[int, int, int]:
    """Of full passes, of ours, and the least."""
    asked = {"kinds": kinds, "severed": severed, "samples": SAMPLES, "noise": 0.5, "window": 2}
    question = ask(model, STATEMENT, None, SAMPLES, 0.5, 1, None, ())
    cells = cells_of(question, kinds, 2, severed, model.layers)
    bound = trace_bound(Cost.of(model), question, cells, model.architecture.parallel)
    full, ours = (
        counted(lambda steps=steps: finish(steps(model, STATEMENT, **asked)))[1]
        for steps in (oracle_steps, trace_steps)
    )
    return full, ours, bound


@pytest.mark.parametrize(
    ("kinds", "severed"), [*(((kind,), False) for kind in KINDS), (KINDS, False), ((), True)]
)
def test_no_trace_does_less_than_the_least(model: LoadedModel, kinds: tuple[str, ...], severed: bool) -> None:
    """Ours lies between full passes and the bound, for every kind."""
    full, ours, bound = trace_work(model, kinds, severed)
    assert bound <= ours < full


def test_the_hidden_map_is_counted_as_on_paper() -> None:
    """Above the runs R N(N+1)/2 L(L-1)/2 tokens in a layer, all of which give a key and a value (methods B.6)."""
    model = tiny("gpt2", layers=4, inner=64)
    question = ask(model, STATEMENT, None, SAMPLES, 0.5, 1, None, ())
    cost = Keys(model.layers, model.width, model.inner_width, 320)
    cells = cells_of(question, ("hidden",), 2, False, cost.layers)
    swept = trace_bound(cost, question, cells) - trace_bound(cost, question, [])
    n = question.length - question.subject[0]
    assert swept == cost.heard * SAMPLES * (n * (n + 1) // 2) * (cost.layers * (cost.layers - 1) // 2)


class Keys(Cost):
    """A model that does nothing but take keys and values."""

    attend = mlp = head = 0  # type: ignore[assignment]

    def attention(self, first: int, count: int) -> int:
        return 0


def statistics(model: LoadedModel, layer: int) -> Statistics:
    return Statistics(layer, torch.eye(model.inner_width, dtype=torch.float64), 1, 0.0, "")


@pytest.mark.parametrize("prompt", ["{} is in the city of", "In the city of {}"])
def test_no_edit_does_less_than_the_least(model: LoadedModel, prompt: str) -> None:
    """Ours does no less than the bound, and less than as many full passes."""
    steps, layer, contexts = 3, 1, ["The Colosseum", "Big Ben can"]
    parameters = RomeParameters(layers=(layer,), steps=steps, stop_loss=0)
    statement: Statement = fill(prompt, "Eiffel Tower")
    find_it = partial(
        find_steps, model, {layer: statistics(model, layer)}, contexts, statement, "Rome", parameters
    )
    found, ours = counted(lambda: finish(find_it()))
    texts = rows(model, statement, "Rome", contexts)
    full = counted(lambda: forward(model, pad([t.ids for t in texts.texts()], model)))[1]
    assert len(found.losses) == steps
    assert edit_bound(Cost.of(model), texts, layer, steps) <= ours < (2 * steps + 1) * full


def test_every_further_step_of_an_edit_costs_the_same() -> None:
    """A forward pass and a backward one."""
    model = tiny("gpt2")
    texts = rows(model, fill("{} is in", "Big Ben"), "Rome", ["The Colosseum"])
    bounds = [edit_bound(Cost.of(model), texts, 1, steps) for steps in (1, 2, 3)]
    assert bounds[2] - bounds[1] == bounds[1] - bounds[0] > 0


def test_the_fraction_avoided_is_of_what_can_be_avoided() -> None:
    """Nothing, half and all of it."""
    assert [avoided(10, ours, 4) for ours in (10, 7, 4)] == [0, 0.5, 1]
