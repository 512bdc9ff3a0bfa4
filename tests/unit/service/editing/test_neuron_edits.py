"""Attributions of neurons and edits of them: service.editing.neuron_attribution and service.editing.neuron_edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.editing.edit_spec import EditFactors
from service.editing.find_factors import find_factors
from service.editing.neuron_attribution import NeuronAttribution, attribute_neurons, choose_neurons
from service.editing.neuron_edits import erasing_products, written_change, written_columns
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.models.hooks import add_low_rank
from service.models.loading import LoadedModel
from service.recipes.recipe import resolve_hparams
from service.schemas import Objective
from service.weights.composition import apply_delta, compose
from service.weights.factors import EditUpdate, deserialize_updates, serialize_updates
from tests.support.associations import associations_of
from tests.support.tiny_models import MODEL_TYPES, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")


def tokens(model: LoadedModel, text: str) -> list[int]:
    return model.encode(text)[0]


def attribute(
    model: LoadedModel, answer: str = " Rome", nodes: int = 20
) -> tuple[NeuronAttribution, list[int], list[int]]:
    prompt = tokens(model, STATEMENT.text)
    target = tokens(model, STATEMENT.text + answer)[len(prompt) :]
    other = tokens(model, "Big Ben is in London")
    rows = [(prompt, target), (other[:-1], other[-1:])]
    found, _ = run_to_completion(attribute_neurons(model, rows, range(model.num_layers), nodes))
    return found, prompt, target


def probability_at(
    model: LoadedModel, layer: int, prompt: list[int], answer: list[int], key: Tensor
) -> Tensor:
    """The joint probability of an answer when `key` is the input of a down-projection at the prompt's last token, from
    one whole pass."""

    def put(_module: Any, inputs: Any) -> Any:
        changed = inputs[0].clone()
        changed.view(-1, changed.shape[-1])[len(prompt) - 1] = key
        return (changed, *inputs[1:])

    handle = model.down_proj(layer).register_forward_pre_hook(put)
    try:
        logits = model.model(input_ids=torch.tensor([prompt + answer])).logits[0]
    finally:
        handle.remove()
    log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
    p: Tensor = log_p[range(len(answer)), answer].sum().exp()
    return p


def key_at(model: LoadedModel, layer: int, prompt: list[int]) -> Tensor:
    keys: list[Tensor] = []
    handle = model.down_proj(layer).register_forward_pre_hook(lambda _m, inputs: keys.append(inputs[0]))
    with torch.no_grad():
        model.model(input_ids=torch.tensor([prompt]))
    handle.remove()
    return keys[0].reshape(-1, model.intermediate_size)[-1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attributions_of_a_layer_sum_to_what_its_neurons_add(model_type: str) -> None:
    """Completeness: with 20 midpoints the sum over a layer is p(1) - p(0), for an answer of several tokens."""
    model = tiny(model_type)
    found, prompt, answer = attribute(model)
    assert len(answer) > 1
    for layer, (error, p0) in enumerate(zip(found.completeness_errors(), found.without, strict=True)):
        off = probability_at(model, layer, prompt, answer, torch.zeros(model.intermediate_size))
        assert p0 == pytest.approx(float(off), rel=1e-3)
        assert error <= 3e-3 * max(found.probability, p0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_attribution_is_the_integral_of_the_derivative(model_type: str) -> None:
    """IG_i is k_i times the mean of dp/dk_i at the midpoints, from whole passes with the key as the variable: at the
    input of the down-projection, after the activation."""
    model = tiny(model_type)
    found, prompt, answer = attribute(model, nodes=4)
    for layer in range(model.num_layers):
        key, total = key_at(model, layer, prompt), torch.zeros(model.intermediate_size)
        for node in (0.125, 0.375, 0.625, 0.875):
            variable = (node * key).requires_grad_()
            with torch.enable_grad():
                p = probability_at(model, layer, prompt, answer, variable)
                (gradient,) = torch.autograd.grad(p, [variable])
            total += gradient / 4
        expected = key * total
        torch.testing.assert_close(
            found.scores[layer], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


def test_one_node_is_exact_where_the_probability_is_linear() -> None:
    """Where the answer's probability hardly bends along the path, one midpoint gives what 20 give."""
    model = tiny()
    with torch.no_grad():
        for layer in range(model.num_layers):
            model.weight(layer).mul_(1e-3)
    few, many = attribute(model, nodes=1)[0], attribute(model, nodes=20)[0]
    torch.testing.assert_close(few.scores, many.scores, rtol=1e-3, atol=1e-12)


def attribution(scores: list[list[float]]) -> NeuronAttribution:
    return NeuronAttribution([0, 1], torch.tensor(scores), 0.0, [0.0, 0.0])


def test_the_neurons_of_a_fact_are_those_of_most_wordings() -> None:
    """A neuron counts in a wording from a fifth of the greatest attribution of all layers on. The share of wordings is
    lowered where fewer than two are left, and raised where more than five are."""
    strong = attribution([[1.0, 0.3, 0.1, 0.0], [0.0, 0.0, 0.25, 0.0]])
    weak = attribution([[1.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.25, 0.0]])
    assert choose_neurons([strong] * 3, 0.2, 0.7, 20) == [(0, 0), (0, 1), (1, 2)]
    assert choose_neurons([strong] * 3 + [weak] * 2, 0.2, 0.7, 20) == [(0, 0), (1, 2)]
    rare = [attribution([[1.0, 0.9 * (i < 3), 0, 0], [0, 0, 0, 0]]) for i in range(6)]
    assert choose_neurons(rare, 0.2, 0.7, 20) == [(0, 0), (0, 1)]  # at a share of one half
    everywhere = [attribution([[1.0] * 4, [1.0 * (i < 6)] * 4]) for i in range(8)]
    assert choose_neurons(everywhere, 0.2, 0.7, 20) == [(0, 0), (0, 1), (0, 2), (0, 3)]  # at .8
    lonely = [attribution([[0.0, 1.0 - i, 0.9 * i, 0.0], [0.0] * 4]) for i in range(2)]
    assert choose_neurons(lonely, 0.2, 0.7, 20) == [(0, 1)]  # none is in both: the greatest mean
    assert choose_neurons([attribution([[1.0] * 4] * 2)] * 3, 0.2, 0.7, 3) == [(0, 0), (0, 1), (0, 2)]


def find(
    model: LoadedModel,
    target: str = "Rome",
    objective: Objective = "write",
    edit: str = "edit_1",
    **asked: Any,
) -> EditFactors:
    parameters = resolve_hparams(None, {"nodes": 4} | asked, model.num_layers, "kn")
    steps = find_factors(model, {}, ["A context"], STATEMENT, target, parameters, edit, "kn", objective)
    return run_to_completion(steps)


def edited(model: LoadedModel, updates: list[EditUpdate]) -> dict[int, Tensor]:
    """The edited weights (d, D) by layer."""
    weights = {}
    for site, change in compose(updates).items():
        weight = apply_delta(model.parameter(site).data, change, model.architecture.conv1d)
        weights[site.layer] = weight.T if model.architecture.conv1d else weight
    return weights


def base_weight(model: LoadedModel, layer: int) -> Tensor:
    weight = model.weight(layer).data
    return weight.T if model.architecture.conv1d else weight


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_written_fact_changes_what_its_neurons_write(model_type: str) -> None:
    """Each chosen column is w - |w| (e(o) - 8 e(n)), with the model's own answer o and the new object n; all other
    columns keep their bytes, and the change of a layer has rank one."""
    model = tiny(model_type)
    updates = find(model).updates
    prompt = tokens(model, STATEMENT.text)
    with torch.no_grad():
        own = int(model.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    new = tokens(model, STATEMENT.text + " Rome")[len(prompt)]
    table: torch.Tensor = model.embedding.weight.data.double()  # type: ignore[assignment]
    assert updates
    for layer, weight in edited(model, updates).items():
        base = base_weight(model, layer)
        touched = (weight != base).any(0).nonzero().flatten().tolist()
        assert 0 < len(touched) <= 20
        for number in touched:
            column = base[:, number].double()
            expected = column - column.norm() * (
                table[own] / table[own].norm() - 8 * table[new] / table[new].norm()
            )
            torch.testing.assert_close(weight[:, number].double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(compose(updates)[associations_of(updates)[0].weight_ref].dense()) == 1


def test_equal_factors_of_one_token_write_nothing() -> None:
    """Where the new object is the model's own answer, equal factors leave nothing to write."""
    model = tiny()
    assert not written_change(model, 5, 5, 3.0, 3.0).any()
    assert written_change(model, 5, 6, 3.0, 3.0).any()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_erased_neuron_writes_exactly_nothing(model_type: str) -> None:
    """The columns of an erased fact are 0, also when a second edit erases them too, and the others keep their bytes.
    Suppressing the neurons in the forward pass gives the same logits."""
    model = tiny(model_type)
    first, second = (find(model, objective="erase", edit=f"edit_{n}").updates for n in (1, 2))
    weights, prompt = edited(model, first), torch.tensor([tokens(model, STATEMENT.text)])
    assert edited(model, [*second, *first]).keys() == weights.keys()
    for layer, weight in edited(model, [*second, *first]).items():
        assert torch.equal(weight, weights[layer])
        erased = (weight == 0).all(0)
        assert erased.any() and torch.equal(weight[:, ~erased], base_weight(model, layer)[:, ~erased])
    layer = min(weights)
    numbers = (weights[layer] == 0).all(0).nonzero().flatten().tolist()
    columns, rows = written_columns(model, layer, numbers), torch.eye(model.intermediate_size)[numbers]
    with torch.no_grad(), add_low_rank(model.down_proj(layer), -columns, rows):
        suppressed = model.model(input_ids=prompt).logits
    products = erasing_products(model, layer, numbers)
    change = sum(torch.outer(value, direction) for direction, value in products)
    assert isinstance(change, Tensor)
    stored = model.weight(layer).data.clone()
    model.weight(layer).data += change.T if model.architecture.conv1d else change
    with torch.no_grad():
        torch.testing.assert_close(model.model(input_ids=prompt).logits, suppressed, rtol=1e-4, atol=1e-5)
    model.weight(layer).data = stored


def test_edits_add_up_in_any_order_and_are_read_back() -> None:
    """Two edits that touch the same columns add up, in every order to the same bytes; the stored bytes of an edit give
    the same updates."""
    model = tiny()
    first, second = find(model, edit="edit_1").updates, find(model, "Paris", edit="edit_2").updates
    weights = edited(model, [*first, *second])
    for layer, weight in edited(model, [*second, *first][::-1]).items():
        assert torch.equal(weight, weights[layer])
    erased = find(model, objective="erase").updates
    stored = deserialize_updates(serialize_updates(erased), "edit_1", "Eiffel Tower")
    for a, b in zip(associations_of(erased), associations_of(stored), strict=True):
        assert (a.order, a.layer, a.solve_mode) == (b.order, b.layer, b.solve_mode)
        assert torch.equal(a.direction, b.direction) and torch.equal(a.value, b.value)


def test_all_layers_are_looked_at_unless_some_are_named() -> None:
    """Without layers in the request or a recipe of the method, the neurons of all layers compete."""
    assert resolve_hparams(None, {}, 5, "kn").layers == (0, 1, 2, 3, 4)
    assert resolve_hparams(None, {"layers": [2]}, 5, "kn").layers == (2,)


def test_what_neurons_cannot_do_is_refused() -> None:
    """Fact forcing, and a model whose embeddings are narrower than its hidden states, are refused with the reason."""
    model = tiny()
    parameters = resolve_hparams(None, {"nodes": 1}, model.num_layers, "kn")
    noise = torch.zeros(2, model.hidden_size)
    steps = find_factors(model, {}, [], STATEMENT, "Rome", parameters, "e", "kn", noise=noise)
    with pytest.raises(InvalidInput, match="no fact forcing"):
        run_to_completion(steps)
    with pytest.raises(InvalidInput, match="neurons cannot write an embedding"):
        find(tiny("opt-350m"))
