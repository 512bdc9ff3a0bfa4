"""The mean and standard deviation of keys and gradients of a layer, by which UltraEdit normalizes those of an edit (Gu
et al. 2026).

They are those of a fixed set of statements with false objects, made from the corpus of the model: the beginning of each
text, continued with the last tokens of another text. So they are a function of the base model and its corpus, and no
request changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from service.covariance.corpus import Corpus
from service.errors import InvalidInput
from service.kit.files import atomic_path
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.object_gradients import TokenRow, object_gradients

CALIBRATION_TEXTS = 256  # of the corpus
OBJECT_TOKENS = 3  # of a false object
MAX_TEXT_TOKENS = 64  # of a text
BATCH_ROWS = 8  # statements of one pass
LEAST_DEVIATION = 1e-2  # of an entry, as a share of the mean of all entries
FILE_FORMAT = 1
_PARTS = ("key_mean", "key_deviation", "gradient_mean", "gradient_deviation")


@dataclass(frozen=True)
class GradientStatistics:
    """The statistics of one layer, in fp64."""

    layer: int
    key_mean: Tensor = field(repr=False)  #: (D,)
    key_deviation: Tensor = field(repr=False)  #: (D,), positive
    gradient_mean: Tensor = field(repr=False)  #: (d,)
    gradient_deviation: Tensor = field(repr=False)  #: (d,), positive
    count: int  #: positions

    @property
    def digest(self) -> str:
        """The SHA-256 of the numbers."""
        digest = hashlib.sha256(f"{self.layer} {self.count}".encode())
        for part in _PARTS:
            digest.update(getattr(self, part).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def normalize(self, keys: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return h^ (n, D) and g^ (n, d), in fp64 on the CPU: each entry less its mean, divided by its deviation."""
        wide_keys, wide_gradients = keys.double().cpu(), gradients.double().cpu()
        return (
            (wide_keys - self.key_mean) / self.key_deviation,
            (wide_gradients - self.gradient_mean) / self.gradient_deviation,
        )


class _Moments:
    """Sums of rows and of their squares, in fp64."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        wide = rows.double().cpu()
        self.total += wide.sum(0)
        self.squares += wide.square().sum(0)

    def mean_and_deviation(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of each entry, none of them near 0."""
        mean = self.total / count
        deviation = (self.squares / count - mean.square()).clamp_min(0).sqrt()
        least = LEAST_DEVIATION * float(deviation.mean())
        return mean, deviation.clamp_min(least if least else 1.0)


def calibration_rows(model: LoadedModel, corpus: Corpus) -> list[TokenRow]:
    """Return the statements, in order of their lengths: a text without its last tokens, and the last tokens of the next
    text as its object. Raise InvalidInput where the corpus has no two texts that are long enough."""
    step = max(1, len(corpus.texts) // CALIBRATION_TEXTS)
    texts = [model.encode(text)[0][:MAX_TEXT_TOKENS] for text in corpus.texts[::step][:CALIBRATION_TEXTS]]
    texts = [ids[: model.max_positions] for ids in texts if len(ids) > OBJECT_TOKENS]
    if len(texts) < 2:
        raise InvalidInput(
            f"the corpus has too few texts with more than {OBJECT_TOKENS} tokens for the statistics of gradients: give "
            "another one with --corpus, or choose another method.",
            "method",
        )
    others = [*texts[1:], texts[0]]
    pairs = [(t[:-OBJECT_TOKENS], o[-OBJECT_TOKENS:]) for t, o in zip(texts, others, strict=True)]
    return sorted(pairs, key=lambda row: len(row[0]))


def collect_gradient_statistics(
    model: LoadedModel, layers: Sequence[int], corpus: Corpus
) -> Stepper[dict[int, GradientStatistics]]:
    """Return the statistics of each layer over the statements of the corpus, eight statements a step."""
    rows = calibration_rows(model, corpus)
    keys = {x: _Moments(model.intermediate_size) for x in layers}
    gradients = {x: _Moments(model.hidden_size) for x in layers}
    for start in range(0, len(rows), BATCH_ROWS):
        found = object_gradients(model, rows[start : start + BATCH_ROWS], layers)
        for x in layers:
            keys[x].add(found.keys[x])
            gradients[x].add(found.gradients[x])
        yield Progress(Phase.STATISTICS, min(start + BATCH_ROWS, len(rows)), len(rows))
    count = OBJECT_TOKENS * len(rows)
    return {
        x: GradientStatistics(
            x, *keys[x].mean_and_deviation(count), *gradients[x].mean_and_deviation(count), count
        )
        for x in layers
    }


def load_or_collect_gradient_statistics(
    model: LoadedModel, layers: Sequence[int], corpus: Corpus, folder: Path | None
) -> Stepper[dict[int, GradientStatistics]]:
    """Return the statistics of each layer, those of the folder where it has them; missing ones are stored there."""
    paths = (
        {x: folder / f"gradients-{_cache_key(model, x, corpus)}.safetensors" for x in layers}
        if folder
        else {}
    )
    statistics = {x: _load(path, x) for x, path in paths.items() if path.exists()}
    missing = [x for x in layers if x not in statistics]
    if missing:
        statistics |= yield from collect_gradient_statistics(model, missing, corpus)
        for x in missing if paths else ():
            with atomic_path(paths[x]) as temporary:  # several workers may share the folder
                tensors = {part: getattr(statistics[x], part).contiguous() for part in _PARTS}
                save_file(tensors, temporary, {"count": str(statistics[x].count)})
    return {x: statistics[x] for x in layers}


def _load(path: Path, layer: int) -> GradientStatistics:
    with safe_open(path, "pt") as file:
        parts = {part: file.get_tensor(part) for part in _PARTS}
        return GradientStatistics(layer, count=int(file.metadata()["count"]), **parts)


def _cache_key(model: LoadedModel, layer: int, corpus: Corpus) -> str:
    parts = {
        "format": FILE_FORMAT,
        "model": model.fingerprint,
        "layer": layer,
        "corpus": corpus.digest,
        "dtype": str(model.weight(layer).dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
