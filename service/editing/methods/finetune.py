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

from service.editing.edit_spec import Training
from service.editing.methods.rome import Found
from service.editing.subject_noise import whole
from service.editing.value_optimizer import low
from service.kit.steps import Progress, Steps
from service.models.hooks import replace
from service.models.loading import LoadedModel, Site
from service.models.precision import wide
from service.models.token_batch import Batch, pad
from service.weights.composition import Addend, Piece


def sites_of(model: LoadedModel, training: Training) -> list[Site]:
    """The weights that are trained."""
    layers = sorted(training.parameters.layers)
    if training.method == "ft-attn":
        return [site for x in layers for site in model.reading(x)]
    return [Site(x) for x in layers]


def train_steps(model: LoadedModel, training: Training) -> Steps[Found]:
    """The addends of one edit. Between two steps the model holds its own weights."""
    parameters, sites = training.parameters, sites_of(model, training)
    start = [wide(model.parameter(site).detach()) for site in sites]
    weights = [w.clone().requires_grad_() for w in start]
    adam = torch.optim.Adam(weights, lr=parameters.learning_rate, weight_decay=parameters.weight_decay)
    batch, losses = pad([t.ids for t in training.rows.texts()[:1]], model), []
    for step in range(parameters.steps):
        with torch.enable_grad():
            loss = _loss(model, training, batch, dict(zip(sites, weights, strict=True)))
            losses.append(float(loss.detach()))
            if low(losses, parameters.stop_loss, training.objective):
                break
            gradients = torch.autograd.grad(loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        adam.step()
        _constrain(weights, start, parameters.epsilon)
        yield Progress("train", step + 1, parameters.steps)
    changes = [(w.detach() - w0).cpu() for w, w0 in zip(weights, start, strict=True)]
    pieces: list[Piece] = [
        Addend(training.edit, training.subject, site, c.T.contiguous() if model.architecture.conv1d else c)
        for site, c in zip(sites, changes, strict=True)
    ]
    norm = float(torch.stack([c.norm() for c in changes]).norm())
    return Found(pieces, losses, norm, float(torch.stack([w.norm() for w in start]).norm()))


def _loss(model: LoadedModel, training: Training, batch: Batch, weights: dict[Site, Tensor]) -> Tensor:
    """With these weights, (): the mean negative log-probability of the object's tokens; to erase, their joint probability."""
    (target,), prompt = training.rows.targets, training.rows.prompts[0]
    placed = {model.parameter_name(s): w.to(model.parameter(s).dtype) for s, w in weights.items()}
    asked = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    change = whole(training.rows.texts()[:1], [training.noise])
    with replace(model.embedding, change) if change else nullcontext():
        logits = functional_call(model.model, placed, kwargs={**asked, "use_cache": False}).logits[0]
    at = len(prompt.ids) - 1
    said = wide(logits[at : at + len(target)]).log_softmax(-1)
    wanted = torch.tensor(target, device=said.device)
    log_p = said.gather(1, wanted[:, None])
    return log_p.sum().exp() if training.objective == "erase" else -log_p.mean()


@torch.no_grad()
def _constrain(weights: list[Tensor], start: list[Tensor], epsilon: float | None) -> None:
    """Keep every entry within epsilon of where it was."""
    if epsilon is None:
        return
    for weight, w0 in zip(weights, start, strict=True):
        weight.copy_(torch.minimum(torch.maximum(weight, w0 - epsilon), w0 + epsilon))
