"""Comparisons: one prompt on two versions, decoded in turn, and the next-token probabilities that differ most."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence, next_token_distribution
from service.errors import Unavailable
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.patches.patch import PatchSet
from service.schemas import WorkerCompareRequest

#: a version and its weights
VersionPatch = tuple[int, PatchSet]
UsePatch = Callable[[PatchSet], AbstractContextManager[LoadedModel]]


def run_comparison(
    model: LoadedModel,
    use_patch: UsePatch,
    request: WorkerCompareRequest,
    sides: tuple[VersionPatch, VersionPatch],
) -> Stepper[dict[str, Any]]:
    """Return the event "end" of a comparison. Each step is one forward pass on each side."""
    started = time.monotonic()
    prompt = request.tokens or request.prompt or ""
    sequences: list[DecodingSequence] = []
    for _, patch in sides:
        with use_patch(patch):
            sequences.append(new_sequence(model, prompt, request))
    for sequence in sequences:
        sequence.end_ids = frozenset(request.end_token_ids)
    batches = [DecodingBatch(model, [r]) for r in sequences]
    p: list[Tensor] = []
    for sequence, (_, patch) in zip(sequences, sides, strict=True):
        with use_patch(patch):
            p.append(next_token_distribution(model, sequence.read_ids))
    yield Progress(Phase.COMPARE, 0, sequences[0].max_new_tokens)
    while any(map(len, batches)):
        for batch, (_, patch) in zip(batches, sides, strict=True):
            with use_patch(patch):
                batch.step()
        yield Progress(Phase.COMPARE, max(len(r.output_ids) for r in sequences), sequences[0].max_new_tokens)
    return {
        "prompt": request.text if request.prompt is None else request.prompt,
        "sides": [_side_result(version, r) for (version, _), r in zip(sides, sequences, strict=True)],
        "next_tokens": most_changed_tokens(model, p[0], p[1], request.top),
        "total_variation": float((p[0] - p[1]).abs().sum() / 2),
        "seconds": round(time.monotonic() - started, 4),
    }


def most_changed_tokens(model: LoadedModel, a: Tensor, b: Tensor, top: int) -> list[dict[str, Any]]:
    """Return the tokens on which two distributions (V,) differ most, largest first; of equal ones the lower id."""
    gaps = (a - b).abs().sort(descending=True, stable=True).indices[:top]
    return [
        {"token": model.tokenizer.decode([i]), "id": i, "p": [float(a[i]), float(b[i])]}
        for i in gaps.tolist()
    ]


def _side_result(version: int, sequence: DecodingSequence) -> dict[str, Any]:
    if sequence.finish_reason == "error":
        raise Unavailable(
            f"version {version} gives logits that are not finite for this prompt: revert its latest edits."
        )
    return {
        "version": version,
        "text": sequence.text,
        "tokens": sequence.output_ids,
        "finish_reason": sequence.finish_reason,
    }
