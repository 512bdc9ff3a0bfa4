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
    """Return the keys (N, D) of the tokens that are not padding."""
    return captured.reshape(*batch.ids.shape, -1)[batch.mask.bool()]


def tokenize_corpus(model: LoadedModel, corpus: Corpus) -> list[list[int]]:
    """Return the corpus as rows of tokens. A text that is too long for one pass is split, so that the memory of a
    pass is bounded."""
    limit = min(model.max_positions, STATISTICS_BATCH_TOKENS)
    token_ids = (model.encode(text)[0] for text in corpus.texts)
    return [ids[at : at + limit] for ids in token_ids for at in range(0, len(ids), limit)]


def batch_by_length(rows: list[list[int]]) -> list[list[list[int]]]:
    """Return batches of rows of similar length, with at most STATISTICS_BATCH_TOKENS tokens each, padding included."""
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
    """Collect the second moment of each layer over the corpus, in one forward pass that stops at the highest layer."""
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
    """Return the statistics of each layer, factorized. Stored statistics are loaded; missing ones are collected and
    stored."""
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
        _ = statistics[layer].cholesky  # factorize now, not in the first edit
        yield Progress(Phase.FACTORIZE, number + 1, len(layers))
    return {layer: statistics[layer] for layer in layers}
