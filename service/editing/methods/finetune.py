"""Fine-tuning of one weight on one statement: FT, FT-L and the late-site edit (Meng et al. 2022; Zhu et al. 2020; methods D.1).

    L(W) = -1/|o| sum_j log p(o_j | prompt + o_<j, W)        Adam; with epsilon, |W - W0| <= epsilon in every entry after each step

FT and FT-L train the MLP's down-projection of a layer, "ft-attn" what the attention of a late layer reads with. The object's tokens
are teacher-forced; the published code scores all of them on the one distribution after the prompt, which is the same for objects
of one token. To erase, L(W) = p(o | prompt, W), the object's joint probability (Hase et al. 2023; methods F.1). Biases stay as they are.

What comes out is not an association at a key: the change of the whole weight is the edit's piece.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.func import functional_call

from service.editing.edit_spec import FineTuneSpec
from service.editing.methods.rome import EditFactors
from service.editing.subject_noise import noise_hook_right_padded
from service.editing.value_optimizer import below_stop_loss
from service.kit.steps import Phase, Progress, Stepper
from service.models.hooks import replace_output
from service.models.loading import LoadedModel, WeightRef
from service.models.precision import at_least_fp32
from service.models.token_batch import PaddedBatch, pad
from service.weights.factors import DenseUpdate, EditUpdate


def trained_weights(model: LoadedModel, spec: FineTuneSpec) -> list[WeightRef]:
    """The weights that are trained."""
    layers = sorted(spec.parameters.layers)
    if spec.method == "ft-attn":
        return [site for x in layers for site in model.attention_weights(x)]
    return [WeightRef(x) for x in layers]


def fine_tune(model: LoadedModel, spec: FineTuneSpec) -> Stepper[EditFactors]:
    """The addends of one edit. Between two steps the model holds its own weights."""
    parameters, weight_refs = spec.parameters, trained_weights(model, spec)
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
    return EditFactors(updates, losses, norm, float(torch.stack([w.norm() for w in initial_weights]).norm()))


def _loss(
    model: LoadedModel, spec: FineTuneSpec, batch: PaddedBatch, weights: dict[WeightRef, Tensor]
) -> Tensor:
    """With these weights, (): the mean negative log-probability of the object's tokens; to erase, their joint probability."""
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
    """Keep every entry within epsilon of where it was."""
    if epsilon is None:
        return
    for weight, w0 in zip(weights, initial_weights, strict=True):
        weight.copy_(torch.minimum(torch.maximum(weight, w0 - epsilon), w0 + epsilon))
