"""Edits of knowledge neurons (Dai et al. 2022, section 4.3): what the neurons of a fact write is changed.

w_i (d,) is what neuron i of a layer writes, column i of its down-projection W, and e(t) the embedding of a token over
its norm. Of the chosen neurons of a layer, with o the model's own answer and n the new object, by their first tokens:

    w_i := w_i - |w_i| (old_weight e(o) - new_weight e(n))

For a layer it is one product: the value (new_weight e(n) - old_weight e(o)) and the direction with |w_i| at the chosen
neurons, 0 elsewhere. To erase, w_i := 0. Nothing is solved: the products of all active edits are added to the base
weights, and of equal ones one counts.

The neurons are those of the model's own answer (to erase: of the object) in the prompt and in the prompt after sampled
contexts (`neuron_attribution.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, NeuronSpec
from service.editing.neuron_attribution import Neuron, attribute_neurons, choose_neurons
from service.errors import InvalidInput
from service.kit.steps import Stepper
from service.methods.parameters import MAX_NEURONS
from service.methods.registry import get_method
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import forward, pad
from service.weights.factors import Association, EditUpdate, SolveMode


def find_neuron_edits(
    model: LoadedModel, _statistics: Mapping[int, KeyStatistics], specs: Sequence[NeuronSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of edits, one after another."""
    factors = []
    for spec in specs:
        factors.append((yield from find_neuron_edit(model, spec)))
    return factors


def find_neuron_edit(model: LoadedModel, spec: NeuronSpec) -> Stepper[EditFactors]:
    """Return the associations of one edit: one for each layer with chosen neurons, or to erase one for each neuron."""
    if spec.noise is not None:
        raise InvalidInput(
            "an edit of neurons has no fact forcing: choose a method that trains a value.", "method"
        )
    if model.embedding_size != model.hidden_size:
        raise InvalidInput(
            f"the embeddings of this model have {model.embedding_size} numbers and its hidden states {model.hidden_size}, so "
            "that neurons cannot write an embedding: choose another method.",
            "method",
        )
    parameters, tokenized = spec.parameters, spec.tokenized
    answer = [_own_answer(model, tokenized.prompts[0].ids)]
    targets = tokenized.targets if spec.objective == "erase" else [answer] * tokenized.size
    rows = [(prompt.ids, target) for prompt, target in zip(tokenized.prompts, targets, strict=True)]
    attributions = yield from attribute_neurons(model, rows, sorted(parameters.layers), parameters.nodes)
    neurons = choose_neurons(attributions, parameters.threshold, parameters.share, MAX_NEURONS)
    updates: list[EditUpdate] = []
    for layer, group in groupby(neurons, lambda neuron: neuron[0]):
        numbers = [number for _, number in group]
        if spec.objective == "erase":
            products = erasing_products(model, layer, numbers)
        else:
            written = written_change(
                model, answer[0], tokenized.targets[0][0], parameters.old_weight, parameters.new_weight
            )
            products = [(_norms_at(model, layer, numbers), written)]
        updates += _associations(spec, layer, products)
    norm = float(
        torch.tensor(
            [u.value.norm() * u.direction.norm() for u in updates if isinstance(u, Association)]
        ).norm()
    )
    return EditFactors(updates, [], norm, _columns_norm(model, neurons))


def _own_answer(model: LoadedModel, prompt: Sequence[int]) -> int:
    """Return the token with which the model continues a prompt."""
    with torch.no_grad():
        return int(forward(model, pad([prompt], model), last=1)[0, -1].argmax())


def written_columns(model: LoadedModel, layer: int, numbers: Sequence[int]) -> Tensor:
    """Return what neurons write, the columns (d, n) of the down-projection, in fp32 on the CPU."""
    weight = model.weight(layer).detach()
    columns = weight[list(numbers)].T if model.architecture.conv1d else weight[:, list(numbers)]
    return at_least_fp32(columns).float().cpu()


def written_change(model: LoadedModel, old: int, new: int, old_weight: float, new_weight: float) -> Tensor:
    """Return new_weight e(n) - old_weight e(o), (d,), with embeddings of norm 1."""
    table: Tensor = model.embedding.weight.detach()  # type: ignore[operator]
    e_old, e_new = (at_least_fp32(table[token]).double().cpu() for token in (old, new))
    change: Tensor = new_weight * e_new / e_new.norm() - old_weight * e_old / e_old.norm()
    return change.float()


def erasing_products(model: LoadedModel, layer: int, numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return the direction (D,) and the value (d,) of each neuron, whose product is its column with the other sign."""
    columns = written_columns(model, layer, numbers)
    unit = torch.eye(model.intermediate_size)
    return [(unit[number], -column) for number, column in zip(numbers, columns.T, strict=True)]


def _norms_at(model: LoadedModel, layer: int, numbers: Sequence[int]) -> Tensor:
    """Return the direction (D,) with the norms of what neurons write at their numbers."""
    direction = torch.zeros(model.intermediate_size)
    direction[list(numbers)] = written_columns(model, layer, numbers).norm(dim=0)
    return direction


def _associations(
    spec: NeuronSpec, layer: int, products: Sequence[tuple[Tensor, Tensor]]
) -> list[EditUpdate]:
    """Return the products of directions and values as associations. Nothing is solved for their keys."""
    method = get_method(spec.method)
    assert method.solve is not None
    mode = SolveMode(method.solve.name)
    return [
        Association(
            spec.edit,
            spec.subject,
            layer,
            direction.clone(),
            direction,
            value.contiguous(),
            mode,
            number=number,
        )
        for number, (direction, value) in enumerate(products)
    ]


def _columns_norm(model: LoadedModel, neurons: Sequence[Neuron]) -> float:
    """Return the norm of all that neurons write."""
    return float(torch.stack([written_columns(model, layer, [n]).norm() for layer, n in neurons]).norm())
