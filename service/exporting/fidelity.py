"""The difference in logits between an export and the edited model that the service serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.versioned_model import VersionedModel
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.token_batch import PaddedBatch, forward, pad
from service.patches.patch import PatchSet

TEXTS_PER_BATCH = 8  # texts in one forward pass


@dataclass(frozen=True)
class LogitDifference:
    """Greatest absolute differences of logits, over all positions of some texts and the vocabulary."""

    export: float  #: between the edited model and the base model with the export in place
    edits: float  #: between the edited model and the base model, for comparison
    agreement: float  #: share of positions at which edited model and export have the same most probable token
    texts: int
    positions: int


def measure_logit_difference(
    replica: VersionedModel,
    patch: PatchSet,
    use_export: Callable[[], AbstractContextManager[object]],
    texts: Sequence[str],
) -> Stepper[LogitDifference]:
    """Return the differences on some texts. Each batch takes three forward passes, each a step. `use_export` puts the
    export in place inside a block."""
    model = replica.base
    rows = sorted((model.encode(t)[0][: model.max_positions] for t in texts), key=len)
    export_difference = edit_difference = 0.0
    same = positions = 0
    for start in range(0, len(rows), TEXTS_PER_BATCH):
        batch = pad(rows[start : start + TEXTS_PER_BATCH], model)
        progress = Progress(Phase.VERIFY, start, len(rows))
        with replica.use_patch(patch):
            edited = _logits(model, batch)
        yield progress
        base = _logits(model, batch)
        edit_difference = max(edit_difference, _max_abs_difference(edited, base))
        del base
        yield progress
        with use_export():
            exported = _logits(model, batch)
        export_difference = max(export_difference, _max_abs_difference(edited, exported))
        same += int((edited.argmax(-1) == exported.argmax(-1)).sum())
        positions += len(edited)
        yield Progress(Phase.VERIFY, min(start + TEXTS_PER_BATCH, len(rows)), len(rows))
    return LogitDifference(export_difference, edit_difference, same / max(1, positions), len(rows), positions)


def _logits(model: LoadedModel, batch: PaddedBatch) -> Tensor:
    """Return the logits (N, V) of the tokens that are not padding."""
    with torch.no_grad():
        return forward(model, batch)[batch.mask.bool()].float()


def _max_abs_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if len(a) else 0.0
