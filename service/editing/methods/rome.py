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

from service.covariance.second_moment import Statistics
from service.editing.edit_spec import Wanted
from service.editing.subject_noise import whole
from service.editing.value_optimizer import Rows, Value, values_steps
from service.errors import InvalidInput
from service.kit.steps import Progress, Steps
from service.models.hooks import add_path, capture, stop_after
from service.models.hooks import replace as replaced
from service.models.loading import LoadedModel
from service.models.precision import wide
from service.models.token_batch import Tokens, forward, pad
from service.recipes.recipe import AlphaEditParameters, MemitParameters, RomeParameters
from service.weights.composition import JOINT, Association, Form, Piece


@dataclass(frozen=True)
class Found:
    """The pieces of one edit and how they were found."""

    pieces: list[Piece]
    losses: list[float]
    delta_norm: float
    value_norm: float


@dataclass(frozen=True)
class Seen:
    """What one pass over some texts shows at the subject's last token."""

    keys: dict[int, Tensor]  #: layer -> (rows, D)
    values: dict[int, Tensor]  #: layer -> (rows, d), the down-projection's output
    hidden: Tensor  #: (rows, d) after the highest edited layer


def _look(
    model: LoadedModel,
    texts: Sequence[Tokens],
    layers: Sequence[int],
    written: Sequence[Association],
    noise: Tensor | None,
) -> Seen:
    """One forward pass over some texts, with associations already written at lower layers in place."""
    batch = pad([t.ids for t in texts], model)
    at = (torch.arange(len(texts)), torch.tensor([t.last_subject for t in texts]))
    with ExitStack() as stack:
        if (change := whole(texts, [noise] * len(texts))) is not None:
            stack.enter_context(replaced(model.embedding, change))
        for a in written:
            factors = a.rank_one()
            left, right = factors.left.to(model.device), factors.right.to(model.device)
            stack.enter_context(add_path(model.down(a.layer), left, right))
        modules = {x: model.down(x) for x in layers}
        keys = stack.enter_context(capture(modules, "input"))
        values = stack.enter_context(capture(modules, "output"))
        top = stack.enter_context(capture({"top": model.block(max(layers))}))
        with stop_after(model.block(max(layers))):  # what lies above is not looked at
            forward(model, batch)

    def pick(t: Tensor) -> Tensor:  # (texts, width)
        return wide(t.reshape(*batch.ids.shape, -1)[at])

    return Seen(
        {x: pick(t) for x, t in keys.items()}, {x: pick(t) for x, t in values.items()}, pick(top["top"])
    )


def _texts(found: Rows, parameters: RomeParameters) -> list[Tokens]:
    """What the key is averaged over: the prompt after each context and, if asked for, the subject alone."""
    return found.prompts + (found.bare if parameters.bare_keys else [])


def _averaged(model: LoadedModel, value: Value, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Keys and values at all that the key is averaged over; what a prompt begins with is not looked at again."""
    found, parameters = wanted.rows, wanted.parameters
    keys, values = wide(value.keys), wide(value.values)
    known = {tuple(p.head): i for i, p in enumerate(found.prompts)}
    unknown = [t for t in _texts(found, parameters) if tuple(t.head) not in known]
    if unknown:
        (layer,) = parameters.layers
        seen = _look(model, [Tokens(t.head, t.subject) for t in unknown], [layer], (), wanted.noise)
        keys, values = torch.cat([keys, seen.keys[layer]]), torch.cat([values, seen.values[layer]])
        known |= {tuple(t.head): found.size + i for i, t in enumerate(unknown)}
    at = [known[tuple(t.head)] for t in _texts(found, parameters)]
    return keys[at], values[at]


def _mean(seen: Tensor, found: Rows, parameters: RomeParameters) -> Tensor:
    """The mean over the prompts, and half-and-half with the mean over the bare subjects where there are any.

    Within each, the first text has no context: it counts `bare_weight`, and the others share what is left.
    """
    groups = [g for g in (seen[: found.size], seen[found.size :]) if len(g)]
    return torch.stack([_weighted(g, parameters.bare_weight) for g in groups]).mean(0)


def _weighted(rows: Tensor, first: float | None) -> Tensor:
    if first is None or len(rows) == 1:
        return rows.mean(0)
    return first * rows[0] + (1 - first) * rows[1:].mean(0)


def _association(wanted: Wanted, statistics: Statistics, key: Tensor, value: Tensor) -> Association:
    """In the form of its method: AlphaEdit changes only what the statistics' keys hardly see."""
    p = wanted.parameters
    form = Form(wanted.method if isinstance(p, MemitParameters) else JOINT.name, p.ridge)
    if isinstance(p, AlphaEditParameters):
        if not statistics.rank(p.threshold):
            raise InvalidInput(
                f"hparams.threshold: all of the keys' directions at layer {statistics.layer} are used more than {p.threshold}, "
                f"so that nothing could change: raise it (the mean is {statistics.moment.diagonal().mean():.3g}).",
                "hparams",
            )
        direction = statistics.project(key, p.threshold).float()
    else:
        direction = statistics.solve(key).float()
    return Association(wanted.edit, wanted.subject, statistics.layer, key.cpu(), direction, value.cpu(), form)


def associate_steps(
    model: LoadedModel, statistics: Mapping[int, Statistics], edits: Sequence[Wanted]
) -> Steps[list[Found]]:
    """The associations of edits of one place. Their values are optimised side by side, each as it would be alone."""
    (place,) = {e.place for e in edits}
    values = yield from values_steps(model, place, edits)
    found = []
    for e, value in zip(edits, values, strict=True):
        write = _several_layers if place.hidden else _one_layer
        result = yield from write(model, statistics, value, e)
        scaled = [a.scaled(e.parameters.strength) for a in result.pieces]
        found.append(replace(result, pieces=scaled))
    return found


def _one_layer(
    model: LoadedModel, statistics: Mapping[int, Statistics], value: Value, wanted: Wanted
) -> Steps[Found]:
    """The association of one layer from an optimised value."""
    parameters, found = wanted.parameters, wanted.rows
    (layer,) = parameters.layers
    yield Progress("solve", 1, 1)
    keys, values = _averaged(model, value, wanted)
    key = _mean(keys, found, parameters)
    delta = value.delta
    if parameters.compat == "meng2022":
        direction = statistics[layer].solve(key)
        bare = keys[0].double().cpu()
        change = (delta.cpu().double() * (direction @ key.double().cpu()) / (direction @ bare)).float()
    elif parameters.anchor == "bare":
        change = value.initial + delta - _mean(values, found, parameters)
    else:
        change = delta
    association = _association(wanted, statistics[layer], key, change)
    return Found([association], value.losses, float(delta.norm()), float(value.initial.norm()))


def _several_layers(
    model: LoadedModel, statistics: Mapping[int, Statistics], value: Value, wanted: Wanted
) -> Steps[Found]:
    """An association for each layer, from the change of the hidden state after the highest."""
    parameters, found = wanted.parameters, wanted.rows
    layers, delta = sorted(parameters.layers), wide(value.delta)
    written: list[Association] = []
    goal: Tensor | None = None
    for i, layer in enumerate(layers):
        seen = _look(model, _texts(found, parameters), layers, written, wanted.noise)
        hidden = _mean(seen.hidden, found, parameters)
        if goal is None:
            goal = hidden + delta
        share = (goal - hidden) / (len(layers) - i)
        key = _mean(seen.keys[layer], found, parameters)
        written.append(_association(wanted, statistics[layer], key, share))
        yield Progress("solve", i + 1, len(layers))
    return Found(list(written), value.losses, float(delta.norm()), float(value.initial.norm()))
