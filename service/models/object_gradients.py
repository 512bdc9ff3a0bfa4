"""The gradients of the loss of an object at down-projections, from one forward and one backward pass.

    L = -1/|o| sum_j log p(o_j | prompt + o_<j)

At the positions that predict the object's tokens, for each layer: the key h (D,), the input of the down-projection; its
output y (d,); and g = dL/dy (d,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import forward, pad

TokenRow = tuple[Sequence[int], Sequence[int]]  #: the tokens of a prompt, and those of the object after it


@dataclass(frozen=True)
class ObjectGradients:
    """What the pass gives at the N positions that predict the objects' tokens, row by row."""

    keys: dict[int, Tensor]  #: layer -> h (N, D)
    outputs: dict[int, Tensor]  #: layer -> y (N, d)
    gradients: dict[int, Tensor]  #: layer -> g (N, d), each of the loss of its own row
    losses: list[float]  #: of each row


def object_gradients(
    model: LoadedModel,
    rows: Sequence[TokenRow],
    layers: Sequence[int],
    embedding_hook: Callable[[Tensor], Tensor] | None = None,
) -> ObjectGradients:
    """Return the keys, outputs and gradients of a batch of rows, in at least single precision on the model's main
    device. `embedding_hook` changes the embeddings (rows, T, d)."""
    batch = pad([[*prompt, *object_[:-1]] for prompt, object_ in rows], model)
    width = batch.ids.shape[1]
    lengths = [len(object_) for _, object_ in rows]
    places = [i * width + len(p) - 1 + j for i, (p, o) in enumerate(rows) for j in range(len(o))]
    at = torch.tensor(places, device=model.device)
    modules = {x: model.down_proj(x) for x in layers}
    changes = {
        x: torch.zeros(len(places), model.hidden_size, device=model.weight(x).device, requires_grad=True)
        for x in layers
    }

    def adding(change: Tensor) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            flat = output.reshape(-1, output.shape[-1])
            return flat.index_add(0, at.to(flat.device), change.to(flat)).view(output.shape)

        return add

    with ExitStack() as stack, torch.enable_grad():
        if embedding_hook is not None:
            stack.enter_context(replace_output(model.embedding, embedding_hook))
        keys = stack.enter_context(capture(modules, "input"))
        outputs = stack.enter_context(capture(modules))
        for x in layers:
            stack.enter_context(replace_output(modules[x], adding(changes[x])))
        logits = at_least_fp32(forward(model, batch).flatten(0, 1)[at])
        ids = torch.tensor([t for _, object_ in rows for t in object_], device=logits.device)
        log_p = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        losses = torch.stack([-part.mean() for part in log_p.split(lengths)])
        gradients = torch.autograd.grad(losses.sum(), list(changes.values()))

    def pick(captured: Tensor) -> Tensor:
        flat = captured.reshape(-1, captured.shape[-1])
        return at_least_fp32(flat[at.to(flat.device)]).to(model.device)

    return ObjectGradients(
        {x: pick(keys[x]) for x in layers},
        {x: pick(outputs[x]) for x in layers},
        {x: at_least_fp32(g).to(model.device) for x, g in zip(layers, gradients, strict=True)},
        losses.detach().tolist(),
    )
