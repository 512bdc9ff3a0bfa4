"""The entry of an edit in a codebook: GRACE (Hartvigsen et al. 2023, section 2).

The key q is the input of one layer's down-projection at the last token of the prompt. The value v (d,) replaces the
output of the down-projection there and is found by Adam through the layers above,

    L(v) = -1/|o| sum_j log p(o_j | prompt + o_<j, v)

with the object's tokens teacher-forced; to erase, L(v) is their joint probability. It starts at the layer's own output
("warm") or at numbers drawn from [0, 1) ("cold", as published). Each edit is found alone, on the base model. What the
layer puts out at other positions, and every weight, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import CodebookSpec, EditFactors
from service.editing.suffix_batch import DeltaSite, LastBlockReader, prefill_suffixes
from service.editing.value_optimizer import below_stop_loss
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.schemas import Objective
from service.weights.factors import CodebookEntry

ERASED = -1  # before the tokens of an erased object in a label


def find_entries(
    model: LoadedModel, _statistics: Mapping[int, KeyStatistics], specs: Sequence[CodebookSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of edits, one after another."""
    factors = []
    for spec in specs:
        factors.append((yield from find_entry(model, spec)))
    return factors


def find_entry(model: LoadedModel, spec: CodebookSpec) -> Stepper[EditFactors]:
    """Return the entry of one edit."""
    if spec.noise is not None:
        raise InvalidInput(
            "an edit of a codebook has no fact forcing: choose a method that changes weights.", "method"
        )
    (layer,), parameters = spec.parameters.layers, spec.parameters
    text, target = spec.text, spec.target
    batch, activations = prefill_suffixes(model, [text], DeltaSite(layer))
    batch = batch.select_rows(torch.zeros(1, dtype=torch.long, device=model.device))
    key, output = at_least_fp32(activations.keys[0]), at_least_fp32(activations.values[0])
    value = _start_value(spec, output).requires_grad_()
    adam, losses = torch.optim.Adam([value], lr=parameters.learning_rate), []
    columns = torch.arange(len(target), device=model.device)
    reader = LastBlockReader(batch, torch.zeros_like(columns), columns)
    yield Progress(Phase.OPTIMIZE, 0, parameters.steps)
    for step in range(parameters.steps):
        with torch.enable_grad():
            logits = batch.block_runner.logits(reader((value - output)[None]))
            loss = _loss(logits, target, spec.objective)
            losses.append(float(loss.detach()))
            if below_stop_loss(losses, parameters.stop_loss, spec.objective):
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
        adam.step()
        yield Progress(Phase.OPTIMIZE, step + 1, parameters.steps)
    found = value.detach()
    radius = parameters.radius * (float(key.norm()) if parameters.radius_unit == "key" else 1.0)
    entry = CodebookEntry(
        spec.edit,
        spec.subject,
        layer,
        key.cpu(),
        output.cpu(),
        found.cpu(),
        radius,
        (*([ERASED] if spec.objective == "erase" else []), *target),
        replayed=parameters.compat is not None,
    )
    return EditFactors([entry], losses, float((found - output).norm()), float(output.norm()))


def _start_value(spec: CodebookSpec, output: Tensor) -> Tensor:
    """Return the value (d,) before the first step."""
    if spec.parameters.start == "warm":
        return output.clone()
    generator = torch.Generator().manual_seed(spec.parameters.seed)
    return torch.rand(len(output), generator=generator).to(output)


def _loss(logits: Tensor, target: Sequence[int], objective: Objective) -> Tensor:
    """Return the loss () from the logits (|o|, V) at the positions whose next tokens are the object's."""
    ids = torch.tensor(target, device=logits.device)
    log_p = at_least_fp32(logits).log_softmax(-1).gather(1, ids[:, None])
    return log_p.sum().exp() if objective == "erase" else -log_p.mean()
