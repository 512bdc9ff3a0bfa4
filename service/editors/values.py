"""v*: the change of value that makes the model say the new object (ROME, Meng et al. 2022, Eq. 4; methods A.6).

    L(delta) = mean_i -log p(o | x_i + s, delta) / |o|  +  kl * KL(p_0 || p_delta)  +  wd * |delta| / |v|^2

delta (d,) is added to the output of one module at the subject's last token in every row: the prompt after each context,
and the bare subject, whose next-token distribution the KL term holds (at the subject's last position: by causality no
suffix such as "is a" could matter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.editors.recipes import RomeParameters
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.prompts import Batch, Tokens, forward, pad, tokens
from service.progress import Progress, Steps
from service.text import Statement, separator, token_span


@dataclass(frozen=True)
class Rows:
    """The statements of one edit as tokens: row 0 is the bare prompt, the others stand after contexts."""

    prompts: list[Tokens]
    targets: list[list[int]]
    essence: Tokens  #: the bare subject

    @property
    def size(self) -> int:
        return len(self.prompts)


def rows(model: LoadedModel, statement: Statement, target: str, contexts: Sequence[str]) -> Rows:
    """Tokenise prompt and object together, once for each context."""
    prompts, targets = [], []
    for lead in ("", *contexts):
        placed = statement.after(lead)
        sep = separator(placed.text, target)
        ids, offsets = model.encode(placed.text + sep + target)
        start = token_span(offsets, (len(placed.text), len(placed.text + sep + target)))[0]
        prompts.append(Tokens(ids[:start], token_span(offsets[:start], placed.span)))
        targets.append(ids[start:])
    begin, end = statement.span
    subject = statement.text[begin:end]
    return Rows(prompts, targets, tokens(model, Statement(subject, (0, len(subject)))))


@dataclass(frozen=True)
class Value:
    """What the optimisation found."""

    delta: Tensor  #: (d,)
    initial: Tensor  #: v (d,): the module's output at the bare prompt's subject, before
    losses: list[float]


def _batch(model: LoadedModel, found: Rows) -> tuple[Batch, Tensor]:
    """All rows, objects without their last token, and each row's position of the subject's last token."""
    texts = [p.ids + t[:-1] for p, t in zip(found.prompts, found.targets, strict=True)]
    texts.append(found.essence.ids)
    last = [p.last_subject for p in found.prompts] + [found.essence.last_subject]
    return pad(texts, model), torch.tensor(last, device=model.device)


def value_steps(
    model: LoadedModel,
    module: nn.Module,
    found: Rows,
    parameters: RomeParameters,
    clamp: float,
) -> Steps[Value]:
    """Optimise delta at the output of `module` with Adam; at most `steps - 1` updates, as published."""
    batch, last = _batch(model, found)
    index = torch.arange(len(last), device=model.device)
    wanted = torch.tensor([t for row in found.targets for t in row], device=model.device)
    line = torch.tensor([i for i, row in enumerate(found.targets) for _ in row], device=model.device)
    place = torch.tensor(
        [
            len(p.ids) - 1 + j
            for p, t in zip(found.prompts, found.targets, strict=True)
            for j in range(len(t))
        ],
        device=model.device,
    )
    weight = torch.tensor([1 / len(row) for row in found.targets for _ in row], device=model.device)
    delta = torch.zeros(model.width, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=parameters.learning_rate)
    initial: Tensor | None = None
    essence: Tensor | None = None
    losses: list[float] = []

    def add(output: Tensor) -> Tensor:
        nonlocal initial
        shaped = output.view(*batch.ids.shape, -1)
        if initial is None:
            initial = shaped[0, last[0]].detach().float().clone()
        shaped[index, last] += delta.to(shaped.dtype)
        return output

    for step in range(parameters.steps):
        with torch.enable_grad(), replace(module, add):
            logits = forward(model, batch)
            said = logits[line, place].float().log_softmax(-1)
            nll = -(said.gather(1, wanted[:, None])[:, 0] * weight).sum() / found.size
            now = logits[-1, last[-1]].float().log_softmax(-1)
            if essence is None:
                essence = now.detach().clone()
            kl = (essence.exp() * (essence - now)).sum()
            assert initial is not None
            scale = initial.norm()
            loss = nll + parameters.kl_factor * kl + parameters.weight_decay * delta.norm() / scale**2
            losses.append(loss.item())
            if losses[-1] < parameters.stop_loss or step == parameters.steps - 1:
                break
            (gradient,) = torch.autograd.grad(loss, delta)
        delta.grad = gradient
        optimizer.step()
        with torch.no_grad():
            limit = clamp * scale
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
        yield Progress("optimise", step + 1, parameters.steps)
    assert initial is not None
    return Value(delta.detach(), initial, losses)
