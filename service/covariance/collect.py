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
from service.covariance.second_moment import KeyStatistics, SecondMomentAccumulator
from service.kit.files import atomic_path
from service.kit.steps import Phase, Progress, Stepper
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.memory_estimates import STATISTICS_BATCH_TOKENS
from service.models.token_batch import PaddedBatch, forward, pad

DAMPING = 1e-3
FILE_FORMAT = 2  # raised when the meaning of a stored file changes


def unpadded_keys(captured: Tensor, batch: PaddedBatch) -> Tensor:
    """Keys of the real tokens, (N, D): padding rows are removed by the mask."""
    return captured.reshape(*batch.ids.shape, -1)[batch.mask.bool()]


def tokenize_corpus(model: LoadedModel, corpus: Corpus) -> list[list[int]]:
    """The corpus as tokens; a text too long for one pass is several rows, so that the memory of a pass is bounded."""
    limit = min(model.max_positions, STATISTICS_BATCH_TOKENS)
    token_ids = (model.encode(text)[0] for text in corpus.texts)
    return [ids[at : at + limit] for ids in token_ids for at in range(0, len(ids), limit)]


def batch_by_length(rows: list[list[int]]) -> list[list[list[int]]]:
    """Rows of similar length together, at most BATCH_TOKENS padded tokens a batch."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if batches and len(row) * (len(batches[-1]) + 1) <= STATISTICS_BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collect_statistics(
    model: LoadedModel, layers: Sequence[int], corpus: Corpus, damping: float = DAMPING
) -> Stepper[dict[int, KeyStatistics]]:
    """C of each layer over the corpus: one forward pass for all layers, stopped at the highest."""
    batches = batch_by_length(tokenize_corpus(model, corpus))
    sums = {layer: SecondMomentAccumulator(model.intermediate_size, model.device) for layer in layers}
    modules = {layer: model.down_proj(layer) for layer in layers}
    for i, rows in enumerate(batches):
        batch = pad(rows, model)
        with capture(modules, "input") as captured, stop_after(model.down_proj(max(layers))):
            forward(model, batch)
        for layer, keys in captured.items():
            sums[layer].add(unpadded_keys(keys, batch))
        yield Progress(Phase.STATISTICS, i + 1, len(batches))
    return {layer: _build_statistics(layer, s.mean(), s.count, damping) for layer, s in sums.items()}


def _build_statistics(layer: int, moment: Tensor, count: int, damping: float) -> KeyStatistics:
    digest = hashlib.sha256(f"{layer} {count} {damping!r} {tuple(moment.shape)}".encode())
    digest.update(moment.contiguous().view(torch.uint8).numpy().data)
    return KeyStatistics(layer, moment, count, damping, digest.hexdigest())


def _cache_key(model: LoadedModel, layer: int, corpus: Corpus, damping: float) -> str:
    parts = {
        "format": FILE_FORMAT,
        "model": model.fingerprint,
        "layer": layer,
        "corpus": corpus.digest,
        "damping": damping,
        "dtype": str(model.weight(layer).dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load_or_collect_statistics(
    model: LoadedModel,
    layers: Sequence[int],
    corpus: Corpus,
    folder: Path | None,
    damping: float = DAMPING,
) -> Stepper[dict[int, KeyStatistics]]:
    """Statistics of each layer, factored: read where they are stored, else collected and stored."""
    statistics: dict[int, KeyStatistics] = {}
    paths = (
        {x: folder / f"moment-{_cache_key(model, x, corpus, damping)}.safetensors" for x in layers}
        if folder
        else {}
    )
    for layer, path in paths.items():
        if path.exists():
            with safe_open(path, "pt") as file:
                statistics[layer] = _build_statistics(
                    layer, file.get_tensor("moment"), int(file.metadata()["count"]), damping
                )
    missing = [x for x in layers if x not in statistics]
    if missing:
        statistics |= yield from collect_statistics(model, missing, corpus, damping)
    for layer in missing if folder else ():
        with atomic_path(paths[layer]) as temporary:  # several workers may share the folder
            save_file(
                {"moment": statistics[layer].moment}, temporary, {"count": str(statistics[layer].count)}
            )
    for number, layer in enumerate(layers):
        _ = statistics[layer].cholesky  # now, and not in the first edit that needs it
        yield Progress(Phase.FACTORIZE, number + 1, len(layers))
    return {layer: statistics[layer] for layer in layers}
