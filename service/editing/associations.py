"""The closed-form methods: the associations that change what the base model says (ROME, MEMIT, EMMET, AlphaEdit).

No weight of the model is changed: the result is a list of associations, one for each edited layer.

One layer (ROME, Meng et al. 2022): k* is the mean key of the subject's edited token over the contexts. v* is the MLP's
output at the bare prompt plus the optimized delta. The change of value is v* - W k*, measured with the same averaged
key (r-ROME, Gupta et al. 2024), so that the edited layer maps k* exactly to v* (`anchor="bare"`). With `anchor="own"`
the change is delta: each text keeps its own value and delta is added to it, as during the optimization. With
`bare_keys` half of the mean key is taken over the bare subject after each context, which makes the key valid for
wordings that begin differently. `bare_weight` is the weight of the text without a context (MEMIT uses 1/2).
`compat="meng2022"` is the published asymmetric form: the averaged key in the direction, the bare prompt's key in
residual and divisor.

Several layers (MEMIT, Meng et al. 2023, Eq. 20): delta is optimized on the hidden state after the highest layer and
written from the lowest layer up. Each layer takes its share of the remaining difference, measured with the edit's own
lower layers in place, and converted to a change of its value (`value_change.py`). MEMIT, EMMET and AlphaEdit write so
for one layer, too. They differ in how their associations are solved together (`SolveRule`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, ValueEditSpec
from service.editing.subject_noise import noise_hook_right_padded
from service.editing.subject_token import SubjectToken
from service.editing.tokenized_contexts import TokenizedContexts
from service.editing.value_change import norm_after_value, value_change
from service.editing.value_optimizer import ValueResult, optimize_values
from service.gating.gate_reference import GateReport
from service.kit.steps import Phase, Progress, Stepper
from service.methods.parameters import RomeParameters
from service.methods.registry import get_method
from service.models.hooks import add_low_rank, capture, stop_after
from service.models.hooks import replace_output as replaced
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import TokenizedStatement, forward, pad
from service.weights.factors import Association, SolveMode


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one forward pass at the edited token of the subject."""

    keys: dict[int, Tensor]  #: layer -> (rows, D)
    values: dict[int, Tensor]  #: layer -> (rows, d), the down-projection's output
    norm_inputs: dict[
        int, Tensor
    ]  #: layer -> (rows, d), the input of the norm after the value, where there is one
    hidden: Tensor  #: (rows, d) after the highest edited layer


def forward_activations(
    model: LoadedModel,
    texts: Sequence[TokenizedStatement],
    layers: Sequence[int],
    written: Sequence[Association],
    noise: Tensor | None,
) -> LayerActivations:
    """Run one forward pass over texts, with the associations in `written` applied at lower layers."""
    batch = pad([t.ids for t in texts], model)
    subject_positions = (torch.arange(len(texts)), torch.tensor([t.edited_index for t in texts]))
    with ExitStack() as stack:
        if (noise_hook := noise_hook_right_padded(texts, [noise] * len(texts))) is not None:
            stack.enter_context(replaced(model.embedding, noise_hook))
        for a in written:
            factors = a.rank_one()
            device = model.weight(a.layer).device
            left, right = factors.left.to(device), factors.right.to(device)
            stack.enter_context(add_low_rank(model.down_proj(a.layer), left, right))
        modules = {x: model.down_proj(x) for x in layers}
        keys = stack.enter_context(capture(modules, "input"))
        values = stack.enter_context(capture(modules, "output"))
        norms = {x: n for x in layers if (n := norm_after_value(model, x)) is not None}
        norm_inputs = stack.enter_context(capture(norms, "input"))
        top = stack.enter_context(capture({"top": model.block(max(layers))}))
        with stop_after(model.block(max(layers))):  # what lies above is not looked at
            forward(model, batch)

    def pick(t: Tensor) -> Tensor:  # (texts, width)
        return at_least_fp32(t.reshape(*batch.ids.shape, -1)[subject_positions]).to(model.device)

    def pick_each(captured: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {layer: pick(t) for layer, t in captured.items()}

    return LayerActivations(pick_each(keys), pick_each(values), pick_each(norm_inputs), pick(top["top"]))


def _key_texts(tokenized: TokenizedContexts, parameters: RomeParameters) -> list[TokenizedStatement]:
    """Return the texts over which the key is averaged: the prompt after each context and, with `bare_keys`, the bare
    subject."""
    return tokenized.prompts + (tokenized.bare_subjects if parameters.bare_keys else [])


def _key_activations(model: LoadedModel, value: ValueResult, spec: ValueEditSpec) -> tuple[Tensor, Tensor]:
    """Return keys (texts, D) and values (texts, d) of all key texts. A text that is the beginning of a prompt is not
    run again."""
    tokenized, parameters = spec.tokenized, spec.parameters
    keys, values = at_least_fp32(value.keys), at_least_fp32(value.values)
    row_of_text = {tuple(p.ids_through_subject): i for i, p in enumerate(tokenized.prompts)}
    unseen_texts = [
        t for t in _key_texts(tokenized, parameters) if tuple(t.ids_through_subject) not in row_of_text
    ]
    if unseen_texts:
        (layer,) = parameters.layers
        activations = forward_activations(
            model,
            [t.through_subject() for t in unseen_texts],
            [layer],
            (),
            spec.noise,
        )
        keys, values = (
            torch.cat([keys, activations.keys[layer]]),
            torch.cat([values, activations.values[layer]]),
        )
        row_of_text |= {tuple(t.ids_through_subject): tokenized.size + i for i, t in enumerate(unseen_texts)}
    selected_rows = [row_of_text[tuple(t.ids_through_subject)] for t in _key_texts(tokenized, parameters)]
    return keys[selected_rows], values[selected_rows]


def _weighted_mean(activations: Tensor, tokenized: TokenizedContexts, parameters: RomeParameters) -> Tensor:
    """Return the mean over the continued prompts, averaged with that of the restatement and with the mean over the bare
    subjects, as far as there are any.

    In each group the first text has no context and has weight `bare_weight`; the others share the rest equally.
    """
    ends = (0, tokenized.continuations, tokenized.size, len(activations))
    groups = [activations[begin:end] for begin, end in pairwise(ends) if end > begin]
    return torch.stack([_mean_with_first_weight(g, parameters.bare_weight) for g in groups]).mean(0)


def _mean_with_first_weight(rows: Tensor, first_weight: float | None) -> Tensor:
    if first_weight is None or len(rows) == 1:
        return rows.mean(0)
    return first_weight * rows[0] + (1 - first_weight) * rows[1:].mean(0)


def _build_association(
    spec: ValueEditSpec, statistics: KeyStatistics, key: Tensor, value: Tensor
) -> Association:
    """Return the association of a key, in the direction and the solve mode of its method."""
    method = get_method(spec.method)
    assert method.solve is not None
    solve_mode = SolveMode(method.solve.name, spec.parameters.ridge)
    direction = method.direction(statistics, key, spec.parameters).float()
    return Association(
        spec.edit, spec.subject, statistics.layer, key.cpu(), direction, value.cpu(), solve_mode
    )


def find_associations(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], specs: Sequence[ValueEditSpec]
) -> Stepper[list[EditFactors]]:
    """Return the associations of edits with one delta site. Their values are optimized in one batch, each as it would
    be alone."""
    (delta_site,) = {spec.delta_site for spec in specs}
    values = yield from optimize_values(model, delta_site, specs)
    factors = []
    for spec, value in zip(specs, values, strict=True):
        write_layers = _write_several_layers if delta_site.on_hidden_state else _write_one_layer
        result = yield from write_layers(model, statistics, value, spec)
        scaled = [a.scaled(spec.parameters.strength) for a in result.updates]
        edited = SubjectToken.of(model, spec.tokenized.prompts[0])
        factors.append(replace(result, updates=scaled, subject_token=edited))
    return factors


def _write_one_layer(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], value: ValueResult, spec: ValueEditSpec
) -> Stepper[EditFactors]:
    """Return the association of one layer for an optimized value."""
    parameters, tokenized = spec.parameters, spec.tokenized
    (layer,) = parameters.layers
    yield Progress(Phase.SOLVE, 1, 1)
    keys, values = _key_activations(model, value, spec)
    key = _weighted_mean(keys, tokenized, parameters)
    delta = value.delta
    if parameters.compat == "meng2022":
        direction = statistics[layer].solve(key)
        bare_key = keys[0].double().cpu()
        value_change = (
            delta.cpu().double() * (direction @ key.double().cpu()) / (direction @ bare_key)
        ).float()
    elif parameters.anchor == "bare":
        value_change = value.initial + delta - _weighted_mean(values, tokenized, parameters)
    else:
        value_change = delta
    association = _build_association(spec, statistics[layer], key, value_change)
    report: GateReport | None = None
    if spec.gate_reference is not None:
        gate = spec.gate_reference.build_gate(keys, spec.subject, parameters.gate_threshold)
        association, report = (
            replace(association, gate=gate),
            spec.gate_reference.describe(gate, spec.subject),
        )
    norms = float(delta.norm()), float(value.initial.norm())
    return EditFactors([association], value.losses, *norms, gate=report)


def _write_several_layers(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], value: ValueResult, spec: ValueEditSpec
) -> Stepper[EditFactors]:
    """Return an association for each layer, which together change the hidden state after the highest layer by delta."""
    parameters, tokenized = spec.parameters, spec.tokenized
    layers, delta = sorted(parameters.layers), at_least_fp32(value.delta)
    written: list[Association] = []
    target_hidden: Tensor | None = None
    for i, layer in enumerate(layers):
        activations = forward_activations(
            model, _key_texts(tokenized, parameters), layers, written, spec.noise
        )
        hidden = _weighted_mean(activations.hidden, tokenized, parameters)
        if target_hidden is None:
            target_hidden = hidden + delta
        share = (target_hidden - hidden) / (len(layers) - i)
        key = _weighted_mean(activations.keys[layer], tokenized, parameters)
        norm_input = _weighted_mean(
            activations.norm_inputs.get(layer, activations.values[layer]), tokenized, parameters
        )
        change = value_change(model, layer, norm_input, share)
        written.append(_build_association(spec, statistics[layer], key, change))
        yield Progress(Phase.SOLVE, i + 1, len(layers))
    return EditFactors(list(written), value.losses, float(delta.norm()), float(value.initial.norm()))
