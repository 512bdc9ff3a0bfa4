"""How far the base model with an adapter is from the edited model that the service itself serves: measured, in logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.versioned_model import Replica, Weights
from service.exporting.lora import Adapter
from service.kit.steps import Progress, Steps
from service.models.loading import LoadedModel
from service.models.token_batch import Batch, forward, pad

ROWS = 8  # texts in one pass


@dataclass(frozen=True)
class Difference:
    """Largest differences of two logits, over all positions of some texts and the whole vocabulary."""

    adapter: float  #: between the edited model and the base model with the adapter
    edits: float  #: between the edited model and the base model, for comparison
    agreement: float  #: share of the positions with the same most probable token in the first two
    texts: int
    positions: int


def difference_steps(
    replica: Replica, weights: Weights, adapter: Adapter, texts: Sequence[str]
) -> Steps[Difference]:
    """Three passes over each batch of texts, a step each."""
    model = replica.base
    rows = sorted((model.encode(t)[0][: model.positions] for t in texts), key=len)
    off = moved = 0.0
    same = positions = 0
    for at in range(0, len(rows), ROWS):
        batch = pad(rows[at : at + ROWS], model)
        progress = Progress("compare with the edited model", at, len(rows))
        with replica.stand(weights):
            edited = _logits(model, batch)
        yield progress
        plain = _logits(model, batch)
        moved = max(moved, _largest(edited, plain))
        del plain
        yield progress
        with adapter.beside(model):
            adapted = _logits(model, batch)
        off = max(off, _largest(edited, adapted))
        same += int((edited.argmax(-1) == adapted.argmax(-1)).sum())
        positions += len(edited)
        yield Progress("compare with the edited model", min(at + ROWS, len(rows)), len(rows))
    return Difference(off, moved, same / max(1, positions), len(rows), positions)


def _logits(model: LoadedModel, batch: Batch) -> Tensor:
    """Of the real tokens, (N, V)."""
    with torch.no_grad():
        return forward(model, batch)[batch.mask.bool()].float()


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if len(a) else 0.0
