"""Edits from one backward pass: service.editing.gradient_edits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.covariance.gradient_statistics import collect_gradient_statistics
from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors
from service.editing.find_factors import find_factors
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.kit.text import Statement, fill_prompt
from service.models.loading import LoadedModel, WeightRef
from service.models.object_gradients import object_gradients
from service.models.scoring import log_probs_blocking
from service.recipes.recipe import resolve_hparams
from service.schemas import Objective
from service.weights.composition import apply_delta, compose
from service.weights.factors import Association, EditUpdate, deserialize_updates, serialize_updates
from tests.support.associations import associations_of
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
CORPUS = Corpus("test", tuple(TEXTS))
METHODS = ["ultraedit", "ultraedit-identity"]


@cache
def statistics_of(model_type: str) -> tuple[LoadedModel, dict[int, KeyStatistics], Any]:
    model = tiny(model_type)
    return (
        model,
        run_to_completion(collect_statistics(model, [0, 1], CORPUS)),
        run_to_completion(collect_gradient_statistics(model, [0, 1], CORPUS)),
    )


def find(
    target: str = "Rome",
    method: str = "ultraedit",
    statement: Statement = STATEMENT,
    objective: Objective = "write",
    edit: str = "edit_1",
    model_type: str = "gpt2",
    **asked: Any,
) -> EditFactors:
    model, moments, gradients = statistics_of(model_type)
    parameters = resolve_hparams(None, {"layers": [0, 1], "eta": 1e-2} | asked, model.num_layers, method)
    steps = find_factors(
        model,
        moments,
        [],
        statement,
        target,
        parameters,
        edit,
        method,
        objective,
        gradient_statistics=gradients,
    )
    return run_to_completion(steps)


def at_layer(updates: list[EditUpdate], layer: int) -> list[Association]:
    return [a for a in associations_of(updates) if a.layer == layer]


def several_edits(method: str, ridge: float) -> list[EditUpdate]:
    """Seven edits with objects of one token and of several."""
    names = ("Louvre", "Big Ben", "Colosseum", "Mount Fuji", "Marie Curie", "Brazil", "Paris")
    return [
        update
        for number, name in enumerate(names)
        for update in find(
            "Rome" if number % 2 else "the city of Rome",
            method,
            fill_prompt("{} is located in the city of", name),
            edit=f"edit_{number}",
            ridge=ridge,
        ).updates
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_object_becomes_more_probable_or_less(model_type: str, method: str) -> None:
    """A small step makes a written object more probable and an erased one less, on every architecture. The base model
    keeps its weights."""
    model = statistics_of(model_type)[0]
    base = {x: model.weight(x).data.clone() for x in (0, 1)}

    def log_p() -> float:
        return float(log_probs_blocking(model, [(STATEMENT.text, "Rome")])[0][0])

    before, after = log_p(), {}
    objectives: tuple[Objective, ...] = ("write", "erase")
    for objective in objectives:
        updates = find(
            "Rome", method, objective=objective, model_type=model_type, eta=1e-3, ridge=1e-2
        ).updates
        assert all(torch.equal(model.weight(x).data, w) for x, w in base.items())
        for site, change in compose(updates).items():
            edited = apply_delta(base[site.layer], change, model.architecture.conv1d)
            model.parameter(site).data = edited
        after[objective] = log_p()
        for x, weight in base.items():
            model.weight(x).data = weight
    assert after["write"] > before > after["erase"]


@pytest.mark.parametrize("method", METHODS)
def test_the_change_is_linear_in_eta(method: str) -> None:
    """Twice the eta is twice the change, and eta 0 leaves the base bytes."""
    model = statistics_of("gpt2")[0]
    changes = {eta: compose(find(method=method, eta=eta).updates) for eta in (0.0, 0.01, 0.02)}
    for site in (WeightRef(0), WeightRef(1)):
        torch.testing.assert_close(
            changes[0.02][site].dense(), 2 * changes[0.01][site].dense(), rtol=1e-5, atol=1e-12
        )
        weight = model.parameter(site).data
        unchanged = apply_delta(weight, changes[0.0][site], model.architecture.conv1d)
        assert torch.equal(unchanged, weight)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_gets_its_change_of_value_exactly(method: str) -> None:
    """With one token and a ridge near 0, dW h = v = -eta |h^|^2 g^, from a pass of its own."""
    model, _, gradients = statistics_of("gpt2")
    ids, _ = model.encode(STATEMENT.text + " i")
    found = object_gradients(model, [(ids[:-1], ids[-1:])], [1])
    statistics = gradients[1]
    h = (found.keys[1][0].double() - statistics.key_mean) / statistics.key_deviation
    g = (found.gradients[1][0].double() - statistics.gradient_mean) / statistics.gradient_deviation
    updates = find("i", method, layers=[1], ridge=1e-9).updates
    change = compose(updates)[WeightRef(1)].dense()
    torch.testing.assert_close(
        change @ found.keys[1][0].double(), -1e-2 * h.square().sum() * g, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("ridge", [0.3, 30.0])
@pytest.mark.parametrize("method", METHODS)
def test_the_change_is_the_ridge_solution_over_all_tokens(method: str, ridge: float) -> None:
    """The version is (H^T H + lambda C)^-1 H^T V, solved with matrices of the width of a key, or with lambda I: the
    twin by the Woodbury identity, with more tokens than one for an edit."""
    _, moments, _ = statistics_of("gpt2")
    updates = several_edits(method, ridge)
    for layer in (0, 1):
        group = at_layer(updates, layer)
        keys = torch.stack([a.key for a in group]).double()
        values = torch.stack([a.value for a in group]).double()
        assert len(group) > 7
        weight = prior(moments[layer]) if method == "ultraedit" else torch.eye(keys.shape[1]).double()
        expected = torch.linalg.solve(keys.T @ keys + ridge * weight, keys.T @ values).T
        torch.testing.assert_close(
            compose(updates)[WeightRef(layer)].dense(),
            expected,
            rtol=1e-3,
            atol=1e-6 * float(expected.abs().max()),
        )


def prior(statistics: KeyStatistics) -> Tensor:
    return statistics.cholesky @ statistics.cholesky.T


@pytest.mark.parametrize("method", METHODS)
def test_a_version_is_a_function_of_the_set_of_edits(method: str) -> None:
    """Every order of the updates gives the same bytes, and without one edit those of a version that never had it. An
    edit is the same whatever was found before it."""
    updates = several_edits(method, 3.0)
    bytes_of = {site: change.dense() for site, change in compose(updates).items()}
    for site, change in compose(updates[::-1]).items():
        assert torch.equal(change.dense(), bytes_of[site])
    others = [u for u in updates if u.edit != "edit_3"]
    again = [u for u in several_edits(method, 3.0)[::-1] if u.edit != "edit_3"]
    for site, change in compose(others).items():
        assert torch.equal(change.dense(), compose(again)[site].dense())
        assert not torch.equal(change.dense(), bytes_of[site])


def test_the_subject_plays_no_part() -> None:
    """Another subject in the same text gives the same keys, directions and changes of value."""
    text = STATEMENT.text
    first, other = (find(statement=Statement(text, span)).updates for span in (STATEMENT.span, (0, 3)))
    for a, b in zip(associations_of(first), associations_of(other), strict=True):
        assert torch.equal(a.key, b.key) and torch.equal(a.direction, b.direction)
        assert torch.equal(a.value, b.value)
        assert a.subject != b.subject


def test_stored_tokens_are_read_back() -> None:
    """The bytes of an edit of several tokens give the same updates, in the order of layer and token."""
    updates = find("the city of Rome").updates
    stored = deserialize_updates(serialize_updates(updates), "edit_1", "Eiffel Tower")
    numbers = [(a.layer, a.number) for a in associations_of(stored)]
    assert numbers == sorted(numbers) and len({n for _, n in numbers}) > 1
    for a, b in zip(associations_of(updates), associations_of(stored), strict=True):
        assert (a.order, a.layer, a.solve_mode) == (b.order, b.layer, b.solve_mode)
        for part in ("key", "direction", "value"):
            assert torch.equal(getattr(a, part), getattr(b, part))


def test_a_very_long_object_is_refused() -> None:
    """The work of a version grows with the tokens of its objects, so that their number is limited."""
    with pytest.raises(InvalidInput, match="the object has 65 tokens, and ultraedit writes at most 64"):
        find("i" * 64 + "i")
