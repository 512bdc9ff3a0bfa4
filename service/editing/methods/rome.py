"""ROME as a pure question: which associations make the base model say the new object (Meng et al. 2022; methods A).

Nothing here touches a weight: the answer is a list of associations, one for each edited layer.

One layer: k* is the mean key of the subject's last token over the contexts; v* adds the optimised delta to the MLP's output at
the bare prompt; the change of value is v* - W k*, measured with the same averaged key (r-ROME, Gupta et al. 2024), so
that the edited layer gives exactly v* at k* (`anchor="bare"`). With `anchor="own"` the change is delta itself: each text keeps
its own value and gets delta on top, as it did during the optimisation. With `bare_keys` half of the key's mean is taken over the
bare subject after each context, so that the key stands for the subject in wordings that begin otherwise; `bare_weight` is the
share of the text without a context (MEMIT takes 1/2). `compat="meng2022"` takes the published asymmetric form: the averaged key in the
direction, the bare prompt's key in residual and divisor.

Several layers: delta is found on the hidden state after the highest, and written from the lowest layer up, each taking its share
of what is still missing, measured with this edit's own lower layers in place (after MEMIT, Meng et al. 2023, Eq. 20). That is
how MEMIT, EMMET and AlphaEdit write, too, on one layer or several; they differ in the form in which their associations are solved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import ValueEditSpec
from service.editing.subject_noise import noise_hook_right_padded
from service.editing.value_optimizer import TokenizedContexts, ValueResult, optimize_values
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.models.hooks import add_low_rank, capture, stop_after
from service.models.hooks import replace_output as replaced
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import TokenizedStatement, forward, pad
from service.recipes.recipe import AlphaEditParameters, MemitParameters, RomeParameters
from service.weights.factors import JOINT, Association, EditUpdate, SolveMode


@dataclass(frozen=True)
class EditFactors:
    """The pieces of one edit and how they were found."""

    updates: list[EditUpdate]
    losses: list[float]
    delta_norm: float
    value_norm: float


@dataclass(frozen=True)
class LayerActivations:
    """What one pass over some texts shows at the subject's last token."""

    keys: dict[int, Tensor]  #: layer -> (rows, D)
    values: dict[int, Tensor]  #: layer -> (rows, d), the down-projection's output
    hidden: Tensor  #: (rows, d) after the highest edited layer


def _forward_activations(
    model: LoadedModel,
    texts: Sequence[TokenizedStatement],
    layers: Sequence[int],
    written: Sequence[Association],
    noise: Tensor | None,
) -> LayerActivations:
    """One forward pass over some texts, with associations already written at lower layers in place."""
    batch = pad([t.ids for t in texts], model)
    subject_positions = (torch.arange(len(texts)), torch.tensor([t.last_subject_index for t in texts]))
    with ExitStack() as stack:
        if (noise_hook := noise_hook_right_padded(texts, [noise] * len(texts))) is not None:
            stack.enter_context(replaced(model.embedding, noise_hook))
        for a in written:
            factors = a.rank_one()
            left, right = factors.left.to(model.device), factors.right.to(model.device)
            stack.enter_context(add_low_rank(model.down_proj(a.layer), left, right))
        modules = {x: model.down_proj(x) for x in layers}
        keys = stack.enter_context(capture(modules, "input"))
        values = stack.enter_context(capture(modules, "output"))
        top = stack.enter_context(capture({"top": model.block(max(layers))}))
        with stop_after(model.block(max(layers))):  # what lies above is not looked at
            forward(model, batch)

    def pick(t: Tensor) -> Tensor:  # (texts, width)
        return at_least_fp32(t.reshape(*batch.ids.shape, -1)[subject_positions])

    return LayerActivations(
        {x: pick(t) for x, t in keys.items()}, {x: pick(t) for x, t in values.items()}, pick(top["top"])
    )


def _key_texts(tokenized: TokenizedContexts, parameters: RomeParameters) -> list[TokenizedStatement]:
    """What the key is averaged over: the prompt after each context and, if asked for, the subject alone."""
    return tokenized.prompts + (tokenized.bare_subjects if parameters.bare_keys else [])


def _key_activations(model: LoadedModel, value: ValueResult, spec: ValueEditSpec) -> tuple[Tensor, Tensor]:
    """Keys and values at all that the key is averaged over; what a prompt begins with is not looked at again."""
    tokenized, parameters = spec.tokenized, spec.parameters
    keys, values = at_least_fp32(value.keys), at_least_fp32(value.values)
    row_of_text = {tuple(p.ids_through_subject): i for i, p in enumerate(tokenized.prompts)}
    unseen_texts = [
        t for t in _key_texts(tokenized, parameters) if tuple(t.ids_through_subject) not in row_of_text
    ]
    if unseen_texts:
        (layer,) = parameters.layers
        activations = _forward_activations(
            model,
            [TokenizedStatement(t.ids_through_subject, t.subject) for t in unseen_texts],
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
    """The mean over the prompts, and half-and-half with the mean over the bare subjects where there are any.

    Within each, the first text has no context: it counts `bare_weight`, and the others share what is left.
    """
    groups = [g for g in (activations[: tokenized.size], activations[tokenized.size :]) if len(g)]
    return torch.stack([_mean_with_first_weight(g, parameters.bare_weight) for g in groups]).mean(0)


def _mean_with_first_weight(rows: Tensor, first_weight: float | None) -> Tensor:
    if first_weight is None or len(rows) == 1:
        return rows.mean(0)
    return first_weight * rows[0] + (1 - first_weight) * rows[1:].mean(0)


def _build_association(
    spec: ValueEditSpec, statistics: KeyStatistics, key: Tensor, value: Tensor
) -> Association:
    """In the form of its method: AlphaEdit changes only what the statistics' keys hardly see."""
    parameters = spec.parameters
    solve_mode = SolveMode(
        spec.method if isinstance(parameters, MemitParameters) else JOINT.name, parameters.ridge
    )
    if isinstance(parameters, AlphaEditParameters):
        if not statistics.projection_rank(parameters.threshold):
            raise InvalidInput(
                f"hparams.threshold: all of the keys' directions at layer {statistics.layer} are used more than {parameters.threshold}, "
                f"so that nothing could change: raise it (the mean is {statistics.moment.diagonal().mean():.3g}).",
                "hparams",
            )
        direction = statistics.project(key, parameters.threshold).float()
    else:
        direction = statistics.solve(key).float()
    return Association(
        spec.edit, spec.subject, statistics.layer, key.cpu(), direction, value.cpu(), solve_mode
    )


def find_associations(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], specs: Sequence[ValueEditSpec]
) -> Stepper[list[EditFactors]]:
    """The associations of edits of one place. Their values are optimised side by side, each as it would be alone."""
    (delta_site,) = {spec.delta_site for spec in specs}
    values = yield from optimize_values(model, delta_site, specs)
    factors = []
    for spec, value in zip(specs, values, strict=True):
        write_layers = _write_several_layers if delta_site.on_hidden_state else _write_one_layer
        result = yield from write_layers(model, statistics, value, spec)
        scaled = [a.scaled(spec.parameters.strength) for a in result.updates]
        factors.append(replace(result, updates=scaled))
    return factors


def _write_one_layer(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], value: ValueResult, spec: ValueEditSpec
) -> Stepper[EditFactors]:
    """The association of one layer from an optimised value."""
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
    return EditFactors([association], value.losses, float(delta.norm()), float(value.initial.norm()))


def _write_several_layers(
    model: LoadedModel, statistics: Mapping[int, KeyStatistics], value: ValueResult, spec: ValueEditSpec
) -> Stepper[EditFactors]:
    """An association for each layer, from the change of the hidden state after the highest."""
    parameters, tokenized = spec.parameters, spec.tokenized
    layers, delta = sorted(parameters.layers), at_least_fp32(value.delta)
    written: list[Association] = []
    target_hidden: Tensor | None = None
    for i, layer in enumerate(layers):
        activations = _forward_activations(
            model, _key_texts(tokenized, parameters), layers, written, spec.noise
        )
        hidden = _weighted_mean(activations.hidden, tokenized, parameters)
        if target_hidden is None:
            target_hidden = hidden + delta
        share = (target_hidden - hidden) / (len(layers) - i)
        key = _weighted_mean(activations.keys[layer], tokenized, parameters)
        written.append(_build_association(spec, statistics[layer], key, share))
        yield Progress(Phase.SOLVE, i + 1, len(layers))
    return EditFactors(list(written), value.losses, float(delta.norm()), float(value.initial.norm()))
