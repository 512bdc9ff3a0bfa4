"""One prompt on two versions: two batches of one row, stepped in turn, and the next tokens that differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from service.engine.decoding import Batch, Row, next_tokens, row
from service.engine.versioned_model import Weights
from service.errors import Unavailable
from service.kit.steps import Progress, Steps
from service.models.loading import LoadedModel
from service.schemas import CompareRequest

#: a version, and its weights
Side = tuple[int, Weights]
Stand = Callable[[Weights], AbstractContextManager[LoadedModel]]


def compare_steps(
    model: LoadedModel, stand: Stand, request: CompareRequest, sides: tuple[Side, Side]
) -> Steps[dict[str, Any]]:
    """The event "end" of a comparison. Each step is one forward pass on each side."""
    started = time.monotonic()
    rows = [row(model, request.prompt, request) for _ in sides]
    batches = [Batch(model, [r]) for r in rows]
    p: list[Tensor] = []
    for _, weights in sides:
        with stand(weights):
            p.append(next_tokens(model, rows[0].prompt))
    yield Progress("compare", 0, rows[0].room)
    while any(map(len, batches)):
        for batch, (_, weights) in zip(batches, sides, strict=True):
            with stand(weights):
                batch.step()
        yield Progress("compare", max(len(r.said) for r in rows), rows[0].room)
    return {
        "prompt": request.prompt,
        "sides": [_side(version, r) for (version, _), r in zip(sides, rows, strict=True)],
        "next_tokens": differences(model, p[0], p[1], request.top),
        "total_variation": float((p[0] - p[1]).abs().sum() / 2),
        "seconds": round(time.monotonic() - started, 4),
    }


def differences(model: LoadedModel, a: Tensor, b: Tensor, top: int) -> list[dict[str, Any]]:
    """The tokens on which two distributions (V,) differ most, largest first; of equals the lower id."""
    gaps = (a - b).abs().sort(descending=True, stable=True).indices[:top]
    return [
        {"token": model.tokenizer.decode([i]), "id": i, "p": [float(a[i]), float(b[i])]}
        for i in gaps.tolist()
    ]


def _side(version: int, r: Row) -> dict[str, Any]:
    if r.finish_reason == "error":
        raise Unavailable(f"version {version} gives no numbers for this prompt: revert its latest edits.")
    return {"version": version, "text": r.text, "tokens": r.said, "finish_reason": r.finish_reason}
