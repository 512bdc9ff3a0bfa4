"""Edits from one forward and one backward pass on the base model (UltraEdit, Gu et al. 2026, section 3).

At each edited layer, and at each position that predicts a token of the object, the key is h, the input of the
down-projection, and the change of value is

    v = -eta |h^|^2 g^

where h^ and g^ are the key and the gradient of the object's loss at the output, normalized with the fixed statistics of
the layer (`service/covariance/gradient_statistics.py`). To erase, v has the other sign: the loss of the true object
rises. All active edits of a layer are solved together in `service/weights/composition.py`:

    dW^T = (H^T H + lambda C)^-1 H^T V        lambda I in place of lambda C for "ultraedit-identity"

The subject of the statement plays no part. Each edit is found alone; another edit does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.covariance.gradient_statistics import GradientStatistics
from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, GradientSpec
from service.editing.subject_noise import noise_hook_right_padded
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.methods.parameters import MAX_OBJECT_TOKENS, GradientParameters
from service.methods.registry import get_method
from service.models.loading import LoadedModel
from service.models.object_gradients import object_gradients
from service.weights.factors import Association, EditUpdate, SolveMode


def find_gradient_edits(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], specs: Sequence[GradientSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of edits, one after another."""
    factors = []
    for number, spec in enumerate(specs):
        factors.append(find_gradient_edit(model, statistics, spec))
        yield Progress(Phase.OPTIMIZE, number + 1, len(specs))
    return factors


def find_gradient_edit(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], spec: GradientSpec
) -> EditFactors:
    """Return the associations of one edit: one for each edited layer and token of the object."""
    (prompt, *_), (target, *_) = spec.tokenized.prompts, spec.tokenized.targets
    if len(target) > MAX_OBJECT_TOKENS:
        raise InvalidInput(
            f"the object has {len(target)} tokens, and {spec.method} writes at most {MAX_OBJECT_TOKENS}: shorten it.",
            "target_new",
        )
    layers = sorted(spec.parameters.layers)
    noise_hook = noise_hook_right_padded(spec.tokenized.texts()[:1], [spec.noise])
    found = object_gradients(model, [(prompt.ids, target)], layers, noise_hook)
    updates: list[EditUpdate] = []
    changes, outputs = [], []
    for layer in layers:
        values = value_changes(
            spec.gradient_statistics[layer], found.keys[layer], found.gradients[layer], spec.parameters
        )
        values = -values if spec.objective == "erase" else values
        updates += _associations(spec, layer, statistics.get(layer), found.keys[layer], values)
        changes.append(values.norm())
        outputs.append(found.outputs[layer].double().norm().cpu())
    delta_norm, value_norm = (float(torch.stack(norms).norm()) for norms in (changes, outputs))
    return EditFactors(updates, found.losses, delta_norm, value_norm)


def value_changes(
    statistics: GradientStatistics, keys: Tensor, gradients: Tensor, parameters: GradientParameters
) -> Tensor:
    """Return v = -eta |h^|^2 g^ for keys (T, D) and gradients (T, d): (T, d) in fp64 on the CPU."""
    normalized_keys, normalized_gradients = statistics.normalize(keys, gradients)
    return -parameters.eta * normalized_keys.square().sum(1, keepdim=True) * normalized_gradients


def _associations(
    spec: GradientSpec, layer: int, statistics: KeyStatistics | None, keys: Tensor, values: Tensor
) -> list[EditUpdate]:
    method = get_method(spec.method)
    assert method.solve is not None
    mode = SolveMode(method.solve.name, spec.parameters.ridge)
    return [
        Association(
            spec.edit,
            spec.subject,
            layer,
            key.float().cpu(),
            method.direction(statistics, key, spec.parameters).float(),  # type: ignore[arg-type]
            value.float(),
            mode,
            number=number,
        )
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
