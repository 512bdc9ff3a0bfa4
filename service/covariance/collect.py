"""Statistics as managed files: collected when missing, stored as safetensors under a key made of all they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from service.covariance.corpus import Corpus
from service.covariance.second_moment import MomentSum, Statistics
from service.kit.ids import new_id
from service.kit.steps import Progress, Steps
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.memory_estimates import BATCH_TOKENS
from service.models.token_batch import Batch, forward, pad

DAMPING = 1e-3
FORMAT = 2  # raised when the meaning of a stored file changes


def keys_of(captured: Tensor, batch: Batch) -> Tensor:
    """Keys of the real tokens, (N, D): padding rows are removed by the mask."""
    return captured.reshape(*batch.ids.shape, -1)[batch.mask.bool()]


def rows_of(model: LoadedModel, corpus: Corpus) -> list[list[int]]:
    """The corpus as tokens; a text too long for one pass is several rows, so that the memory of a pass is bounded."""
    limit = min(model.positions, BATCH_TOKENS)
    coded = (model.encode(text)[0] for text in corpus.texts)
    return [ids[at : at + limit] for ids in coded for at in range(0, len(ids), limit)]


def batches_of(rows: list[list[int]]) -> list[list[list[int]]]:
    """Rows of similar length together, at most BATCH_TOKENS padded tokens a batch."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if batches and len(row) * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collect_steps(
    model: LoadedModel, layers: Sequence[int], corpus: Corpus, damping: float = DAMPING
) -> Steps[dict[int, Statistics]]:
    """C of each layer over the corpus: one forward pass for all layers, stopped at the highest."""
    batches = batches_of(rows_of(model, corpus))
    sums = {layer: MomentSum(model.inner_width, model.device) for layer in layers}
    modules = {layer: model.down(layer) for layer in layers}
    for i, rows in enumerate(batches):
        batch = pad(rows, model)
        with capture(modules, "input") as seen, stop_after(model.down(max(layers))):
            forward(model, batch)
        for layer, keys in seen.items():
            sums[layer].add(keys_of(keys, batch))
        yield Progress("statistics", i + 1, len(batches))
    return {layer: _statistics(layer, s.mean(), s.count, damping) for layer, s in sums.items()}


def _statistics(layer: int, moment: Tensor, count: int, damping: float) -> Statistics:
    digest = hashlib.sha256(f"{layer} {count} {damping!r} {tuple(moment.shape)}".encode())
    digest.update(moment.contiguous().view(torch.uint8).numpy().data)
    return Statistics(layer, moment, count, damping, digest.hexdigest())


def _key(model: LoadedModel, layer: int, corpus: Corpus, damping: float) -> str:
    parts = {
        "format": FORMAT,
        "model": model.fingerprint,
        "layer": layer,
        "corpus": corpus.digest,
        "damping": damping,
        "dtype": str(model.weight(layer).dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def statistics_steps(
    model: LoadedModel,
    layers: Sequence[int],
    corpus: Corpus,
    folder: Path | None,
    damping: float = DAMPING,
) -> Steps[dict[int, Statistics]]:
    """Statistics of each layer, factored: read where they are stored, else collected and stored."""
    found: dict[int, Statistics] = {}
    paths = (
        {x: folder / f"moment-{_key(model, x, corpus, damping)}.safetensors" for x in layers}
        if folder
        else {}
    )
    for layer, path in paths.items():
        if path.exists():
            with safe_open(path, "pt") as file:
                found[layer] = _statistics(
                    layer, file.get_tensor("moment"), int(file.metadata()["count"]), damping
                )
    missing = [x for x in layers if x not in found]
    if missing:
        found |= yield from collect_steps(model, missing, corpus, damping)
    for layer in missing if folder else ():
        path = paths[layer]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix("." + new_id("part"))  # other workers may share the folder
        save_file({"moment": found[layer].moment}, part, {"count": str(found[layer].count)})
        part.replace(path)
    for number, layer in enumerate(layers):
        _ = found[layer].cholesky  # now, and not in the first edit that needs it
        yield Progress("factor", number + 1, len(layers))
    return {layer: found[layer] for layer in layers}
