"""Statistics as managed files: collected when missing, stored as safetensors under a key made of all they depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
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
CHECKPOINT_INTERVAL = 30.0  # seconds between two checkpoints of a collection
FILE_FORMAT = 2  # raised when the meaning of a stored file changes


def unpadded_keys(captured: Tensor, batch: PaddedBatch) -> Tensor:
    """Return the keys (N, D) of the tokens that are not padding."""
    return captured.reshape(*batch.ids.shape, -1)[batch.mask.to(captured.device).bool()]


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
    model: LoadedModel,
    layers: Sequence[int],
    corpus: Corpus,
    damping: float = DAMPING,
    checkpoint: MomentCheckpoint | None = None,
) -> Stepper[dict[int, KeyStatistics]]:
    """Collect the second moment of each layer over the corpus, in one forward pass that stops at the highest layer.

    With a checkpoint, an interrupted collection continues with the same sums.
    """
    batches = batch_by_length(tokenize_corpus(model, corpus))
    sums = {
        layer: SecondMomentAccumulator(model.intermediate_size, model.weight(layer).device)
        for layer in layers
    }
    added = {layer: checkpoint.load(layer, s) if checkpoint else 0 for layer, s in sums.items()}
    modules = {layer: model.down_proj(layer) for layer in layers}
    for i in range(min(added.values()), len(batches)):
        batch = pad(batches[i], model)
        with capture(modules, "input") as captured, stop_after(model.down_proj(max(layers))):
            forward(model, batch)
        for layer, keys in captured.items():
            yield Progress(Phase.STATISTICS, i, len(batches))  # the products of a layer are a step
            if i >= added[layer]:
                sums[layer].add(unpadded_keys(keys, batch))
        progress = Progress(Phase.STATISTICS, i + 1, len(batches))
        yield progress
        if checkpoint is not None and i + 1 < len(batches) and checkpoint.is_due:
            for layer, total in sums.items():
                checkpoint.save(layer, total, max(added[layer], i + 1))
                yield progress
    statistics: dict[int, KeyStatistics] = {}
    for layer, total in sums.items():
        statistics[layer] = _build_statistics(layer, total.mean(), total.count, damping)
        yield Progress(Phase.STATISTICS, len(batches), len(batches))
    return statistics


class MomentCheckpoint:
    """Files with the sums of a collection that is not complete, one for each layer."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self._paths = {layer: path.with_suffix(".partial") for layer, path in paths.items()}
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= CHECKPOINT_INTERVAL

    def load(self, layer: int, sums: SecondMomentAccumulator) -> int:
        """Restore the sums of a layer. Return the number of batches that are in them."""
        path = self._paths[layer]
        if not path.exists():
            return 0
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            sums.total.copy_(file.get_tensor("total"))
        sums.count = int(metadata["count"])
        return int(metadata["batches"])

    def save(self, layer: int, sums: SecondMomentAccumulator, batches: int) -> None:
        with atomic_path(self._paths[layer]) as temporary:
            metadata = {"count": str(sums.count), "batches": str(batches)}
            save_file({"total": sums.total.cpu().contiguous()}, temporary, metadata)
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)


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
        checkpoint = MomentCheckpoint({x: paths[x] for x in missing}) if folder else None
        statistics |= yield from collect_statistics(model, missing, corpus, damping, checkpoint)
        for layer in missing if folder else ():
            with atomic_path(paths[layer]) as temporary:  # several workers may share the folder
                save_file(
                    {"moment": statistics[layer].moment}, temporary, {"count": str(statistics[layer].count)}
                )
            yield Progress(Phase.FACTORIZE, 0, len(layers))
        if checkpoint is not None:
            checkpoint.remove()
    for number, layer in enumerate(layers):
        _ = statistics[layer].cholesky  # factorize now, not in the first edit
        yield Progress(Phase.FACTORIZE, number + 1, len(layers))
    return {layer: statistics[layer] for layer in layers}
