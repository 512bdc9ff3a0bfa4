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
of what is still missing, measured with this edit's own lower layers in place (after MEMIT, Meng et al. 2023, Eq. 20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.covariance.moment import Statistics
from service.editors.composition import Association
from service.editors.recipes import RomeParameters
from service.editors.values import Place, Rows, Value, rows, value_steps, wide
from service.models.hooks import add_path, capture, stop_after
from service.models.loading import LoadedModel
from service.models.prompts import Tokens, forward, pad
from service.progress import Progress, Steps
from service.text import Statement, words


@dataclass(frozen=True)
class Found:
    """The associations of one edit and how they were found."""

    associations: list[Association]
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
    model: LoadedModel, texts: Sequence[Tokens], layers: Sequence[int], written: Sequence[Association]
) -> Seen:
    """One forward pass over some texts, with associations already written at lower layers in place."""
    batch = pad([t.ids for t in texts], model)
    at = (torch.arange(len(texts)), torch.tensor([t.last_subject for t in texts]))
    with ExitStack() as stack:
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
        return t.reshape(*batch.ids.shape, -1)[at].float()

    return Seen(
        {x: pick(t) for x, t in keys.items()}, {x: pick(t) for x, t in values.items()}, pick(top["top"])
    )


def _texts(found: Rows, parameters: RomeParameters) -> list[Tokens]:
    """What the key is averaged over: the prompt after each context and, if asked for, the subject alone."""
    return found.prompts + (found.bare if parameters.bare_keys else [])


def _averaged(seen: Tensor, found: Rows, parameters: RomeParameters) -> Tensor:
    """Of what was seen at all texts, that which counts for the key: see `_texts`."""
    return seen if parameters.bare_keys else seen[: found.size]


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


def _association(edit: str, subject: str, statistics: Statistics, key: Tensor, value: Tensor) -> Association:
    direction = statistics.solve(key).float()
    return Association(edit, subject, statistics.layer, key.cpu(), direction, value.cpu())


def find_steps(
    model: LoadedModel,
    statistics: Mapping[int, Statistics],
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: RomeParameters,
    edit: str = "",
) -> Steps[Found]:
    """Find the associations that make the model, as it stands (the base model), say `target` after the statement."""
    found = rows(model, statement, target, contexts, parameters.bare_keys)
    subject = words(statement.text[slice(*statement.span)])
    layers = sorted(parameters.layers)
    if len(layers) == 1:
        result = yield from _one_layer(model, statistics, found, parameters, edit, subject)
    else:
        result = yield from _several_layers(model, statistics, found, parameters, edit, subject)
    return replace(result, associations=[a.scaled(parameters.strength) for a in result.associations])


def _one_layer(
    model: LoadedModel,
    statistics: Mapping[int, Statistics],
    found: Rows,
    parameters: RomeParameters,
    edit: str,
    subject: str,
) -> Steps[Found]:
    place = Place(parameters.layers[0])
    value = yield from value_steps(model, place, found, parameters, parameters.clamp)
    yield Progress("solve", 1, 1)
    return _solve(value, statistics[place.layer], found, parameters, edit, subject)


def _solve(
    value: Value, statistics: Statistics, found: Rows, parameters: RomeParameters, edit: str, subject: str
) -> Found:
    """The association of one layer from an optimised value."""
    keys, values = (_averaged(wide(x), found, parameters) for x in (value.keys, value.values))
    key = _mean(keys, found, parameters)
    delta = value.delta
    if parameters.compat == "meng2022":
        direction = statistics.solve(key)
        bare = keys[0].double().cpu()
        change = (delta.cpu().double() * (direction @ key.double().cpu()) / (direction @ bare)).float()
    elif parameters.anchor == "bare":
        change = value.initial + delta - _mean(values, found, parameters)
    else:
        change = delta
    association = _association(edit, subject, statistics, key, change)
    return Found([association], value.losses, float(delta.norm()), float(value.initial.norm()))


def _several_layers(
    model: LoadedModel,
    statistics: Mapping[int, Statistics],
    found: Rows,
    parameters: RomeParameters,
    edit: str,
    subject: str,
) -> Steps[Found]:
    layers = sorted(parameters.layers)
    value = yield from value_steps(model, Place(layers[-1], hidden=True), found, parameters, parameters.clamp)
    delta = value.delta.float()
    written: list[Association] = []
    wanted: Tensor | None = None
    for i, layer in enumerate(layers):
        seen = _look(model, _texts(found, parameters), layers, written)
        hidden = _mean(seen.hidden, found, parameters)
        if wanted is None:
            wanted = hidden + delta
        share = (wanted - hidden) / (len(layers) - i)
        key = _mean(seen.keys[layer], found, parameters)
        written.append(_association(edit, subject, statistics[layer], key, share))
        yield Progress("solve", i + 1, len(layers))
    return Found(written, value.losses, float(delta.norm()), float(value.initial.norm()))
