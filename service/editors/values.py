"""v*: the change of value that makes the model say the new object (ROME, Meng et al. 2022, Eq. 4; methods A.6).

    L(delta) = mean_i -log p(o | x_i + s, delta) / |o|  +  kl * KL(p_0 || p_delta)  +  wd * |delta| / |v|^2

delta (d,) is added to the output of one module at the subject's last token in every row: the prompt after each context,
and the bare subject, whose next-token distribution the KL term holds (at the subject's last position: by causality no
suffix such as "is a" could matter).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from service.editors.recipes import RomeParameters
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.prompts import Tokens, pad, tokens
from service.progress import Progress, Steps
from service.text import Statement, separator, token_span


@dataclass(frozen=True)
class Rows:
    """The statements of one edit as tokens: row 0 is the bare prompt, the others stand after contexts."""

    prompts: list[Tokens]
    targets: list[list[int]]
    essence: Tokens  #: the bare subject
    bare: list[Tokens]  #: the subject after each context, without the prompt

    @property
    def size(self) -> int:
        return len(self.prompts)


def _leads(contexts: Sequence[str]) -> list[str]:
    """Nothing, and the contexts as closed sentences."""
    return ["", *(f"{c}. " if c else "" for c in contexts)]


def rows(model: LoadedModel, statement: Statement, target: str, contexts: Sequence[str]) -> Rows:
    """Tokenise prompt and object together, once for each context that fits beside them."""
    prompts, targets = [], []
    for lead in _leads(contexts):
        placed = statement.after(lead)
        sep = separator(placed.text, target)
        ids, offsets = model.encode(placed.text + sep + target)
        if lead and len(ids) > model.positions:
            continue
        start = token_span(offsets, (len(placed.text), len(placed.text + sep + target)))[0]
        prompts.append(Tokens(ids[:start], token_span(offsets[:start], placed.span)))
        targets.append(ids[start:])
    begin, end = statement.span
    subject = statement.text[begin:end]
    alone = Statement(subject, (0, len(subject)))
    bare = [tokens(model, alone.after(lead)) for lead in _leads(contexts)]
    return Rows(prompts, targets, bare[0], bare)


@dataclass(frozen=True)
class Value:
    """What the optimisation found."""

    delta: Tensor  #: (d,)
    initial: Tensor  #: v (d,): the module's output at the bare prompt's subject, before
    losses: list[float]


@dataclass(frozen=True)
class Suffixes:
    """The rows from the subject's last token on. What stands before it is constant by causality: only its keys and
    values in attention are kept (methods G.2), so a step computes a few positions a row in place of all."""

    ids: Tensor  #: (B, A) right-padded; column 0 is the subject's last token
    mask: Tensor  #: (B, P + A), over the left-padded prefixes and the suffixes
    positions: Tensor  #: (B, A)
    prefix: DynamicCache

    def forward(self, model: LoadedModel) -> Tensor:
        """Logits (B, A, V)."""
        return model.model(  # type: ignore[no-any-return]
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=deepcopy(self.prefix),  # a pass appends to its cache
            use_cache=True,
        ).logits


def suffixes(model: LoadedModel, found: Rows) -> Suffixes:
    """All rows, objects without their last token, and last the bare subject; one pass over what precedes."""
    texts = [p.ids + t[:-1] for p, t in zip(found.prompts, found.targets, strict=True)]
    starts = [p.last_subject for p in found.prompts] + [found.essence.last_subject]
    texts.append(found.essence.ids[: starts[-1] + 1])
    before = pad([t[:s] for t, s in zip(texts, starts, strict=True)], model, side="left")
    after = pad([t[s:] for t, s in zip(texts, starts, strict=True)], model)
    cache = DynamicCache(config=model.model.config)
    if before.ids.shape[1]:
        with torch.no_grad():
            model.model(
                input_ids=before.ids,
                attention_mask=before.mask,
                position_ids=before.positions,
                past_key_values=cache,
                use_cache=True,
            )
    first = torch.tensor(starts, device=model.device)[:, None]
    mask = torch.cat([before.mask, after.mask], 1)
    return Suffixes(after.ids, mask, first + after.positions, cache)


@dataclass(frozen=True)
class Wanted:
    """Where the object's tokens are to be said: row, column of the suffix, token, and weight 1 / |o|; flat, (N,) each."""

    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor


def _wanted(found: Rows, device: torch.device) -> Wanted:
    places = [
        (i, len(p.ids) - 1 - p.last_subject + j, token, 1 / len(t))
        for i, (p, t) in enumerate(zip(found.prompts, found.targets, strict=True))
        for j, token in enumerate(t)
    ]
    row, column, token, weight = zip(*places, strict=True)
    return Wanted(*(torch.tensor(x, device=device) for x in (row, column, token, weight)))


def value_steps(
    model: LoadedModel, module: nn.Module, found: Rows, parameters: RomeParameters, clamp: float
) -> Steps[Value]:
    """Optimise delta at the output of `module` with Adam; at most `steps - 1` updates, as published."""
    texts = suffixes(model, found)
    wanted = _wanted(found, model.device)
    delta = torch.zeros(model.width, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=parameters.learning_rate)
    initial: Tensor | None = None
    essence: Tensor | None = None
    losses: list[float] = []
    yield Progress("optimise", 0, parameters.steps)

    def add(output: Tensor) -> Tensor:
        nonlocal initial
        shaped = output.view(*texts.ids.shape, -1)
        if initial is None:
            initial = shaped[0, 0].detach().float().clone()
        shaped[:, 0] += delta.to(shaped.dtype)
        return output

    for step in range(parameters.steps):
        with torch.enable_grad(), replace(module, add):
            logits = texts.forward(model)
            said = logits[wanted.row, wanted.column].float().log_softmax(-1)
            nll = -(said.gather(1, wanted.token[:, None])[:, 0] * wanted.weight).sum() / found.size
            now = logits[-1, 0].float().log_softmax(-1)
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
