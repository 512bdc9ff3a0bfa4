"""Fine-tuning of one weight on one statement: FT, FT-L and the late-site edit (Meng et al. 2022; Zhu et al. 2020).

    L(W) = -1/|o| sum_j log p(o_j | prompt + o_<j, W)

It is minimized with Adam. With epsilon, every entry is clipped to |W - W0| <= epsilon after each step.

FT and FT-L train the MLP's down-projection of a layer, "ft-attn" the query, key and value projections of a late
layer. The object's tokens are teacher-forced. The published code scores all of them on the one distribution after the
prompt, which is the same for objects of one token. To erase, L(W) = p(o | prompt, W), the joint probability of the
object (Hase et al. 2023). Biases are not trained.

The result is not an association at a key but the change of the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.func import functional_call

from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors, FineTuneSpec
from service.editing.subject_noise import noise_hook_right_padded
from service.editing.value_optimizer import below_stop_loss
from service.kit.steps import Phase, Progress, Stepper
from service.models.hooks import replace_output
from service.models.loading import LoadedModel, WeightRef
from service.models.precision import at_least_fp32
from service.models.token_batch import PaddedBatch, pad
from service.weights.factors import DenseUpdate, EditUpdate


def fine_tune_all(
    model: LoadedModel, _statistics: Mapping[int, KeyStatistics], specs: Sequence[FineTuneSpec]
) -> Stepper[list[EditFactors]]:
    """Return the factors of edits, trained one after another, each from the model's own weights."""
    factors = []
    for spec in specs:
        factors.append((yield from fine_tune(model, spec)))
    return factors


def fine_tune(model: LoadedModel, spec: FineTuneSpec) -> Stepper[EditFactors]:
    """Return the dense updates of one edit. Between two steps the model has its own weights."""
    parameters, weight_refs = spec.parameters, spec.trained_weights(model)
    initial_weights = [at_least_fp32(model.parameter(site).detach()) for site in weight_refs]
    weights = [w.clone().requires_grad_() for w in initial_weights]
    adam = torch.optim.Adam(weights, lr=parameters.learning_rate, weight_decay=parameters.weight_decay)
    batch, losses = pad([t.ids for t in spec.tokenized.texts()[:1]], model), []
    for step in range(parameters.steps):
        with torch.enable_grad():
            loss = _loss(model, spec, batch, dict(zip(weight_refs, weights, strict=True)))
            losses.append(float(loss.detach()))
            if below_stop_loss(losses, parameters.stop_loss, spec.objective):
                break
            gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        adam.step()
        _clip_to_epsilon(weights, initial_weights, parameters.epsilon)
        yield Progress(Phase.TRAIN, step + 1, parameters.steps)
    changes = [(w.detach() - w0).cpu() for w, w0 in zip(weights, initial_weights, strict=True)]
    updates: list[EditUpdate] = [
        DenseUpdate(spec.edit, spec.subject, site, c.T.contiguous() if model.architecture.conv1d else c)
        for site, c in zip(weight_refs, changes, strict=True)
    ]
    norm = float(torch.stack([c.norm() for c in changes]).norm())
    return EditFactors(
        updates, losses, norm, float(torch.stack([w.norm().cpu() for w in initial_weights]).norm())
    )


def _loss(
    model: LoadedModel, spec: FineTuneSpec, batch: PaddedBatch, weights: dict[WeightRef, Tensor]
) -> Tensor:
    """Return the loss () with these weights: the mean negative log-probability of the object's tokens, or, to erase,
    their joint probability."""
    (target,), prompt = spec.tokenized.targets, spec.tokenized.prompts[0]
    named_weights = {model.parameter_name(s): w.to(model.parameter(s).dtype) for s, w in weights.items()}
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    noise_hook = noise_hook_right_padded(spec.tokenized.texts()[:1], [spec.noise])
    with replace_output(model.embedding, noise_hook) if noise_hook else nullcontext():
        logits = functional_call(model.model, named_weights, kwargs={**inputs, "use_cache": False}).logits[0]
    last_prompt_position = len(prompt.ids) - 1
    log_probs = at_least_fp32(logits[last_prompt_position : last_prompt_position + len(target)]).log_softmax(
        -1
    )
    target_ids = torch.tensor(target, device=log_probs.device)
    log_p = log_probs.gather(1, target_ids[:, None])
    return log_p.sum().exp() if spec.objective == "erase" else -log_p.mean()


@torch.no_grad()
def _clip_to_epsilon(weights: list[Tensor], initial_weights: list[Tensor], epsilon: float | None) -> None:
    """Clip every entry to within epsilon of its initial value, in place."""
    if epsilon is None:
        return
    for weight, w0 in zip(weights, initial_weights, strict=True):
        weight.copy_(torch.minimum(torch.maximum(weight, w0 - epsilon), w0 + epsilon))
