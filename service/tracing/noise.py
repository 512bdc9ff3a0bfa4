"""The noise that corrupts a subject's embeddings (Meng et al. 2022, section 2.1).

Noise is paired: one tensor z of shape (R, corrupted tokens, d) is drawn before the first pass, and every pass of a
trace uses it, so two cells differ only by what was restored. It is drawn in C order with the sample as the slowest
index, so the first samples do not depend on the number of samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.errors import InvalidInput
from service.models.loading import LoadedModel

NOISE_PATTERN = re.compile(
    r"\s*(?:(?P<before>\d*\.?\d+)\s*(?:sigma|σ|s)|s(?P<after>\d*\.?\d+)|(?P<plain>\d*\.?\d+))\s*"
)
EMBEDDING_CHUNK_ROWS = 4096  # rows of the embedding matrix in one chunk


@dataclass(frozen=True)
class NoiseLevel:
    """The standard deviation of the noise; `factor` times `sigma` where sigma was measured on the embeddings."""

    value: float
    factor: float | None = None
    sigma: float | None = None


def parse_noise_level(model: LoadedModel, noise: float | str, subjects: Sequence[str] = ()) -> NoiseLevel:
    """Parse a number, or a multiple of the embeddings' deviation: "3sigma" or, as in the authors' code, "s3"."""
    if isinstance(noise, str):
        match = NOISE_PATTERN.fullmatch(noise)
        if match is None:
            raise InvalidInput(
                f"the noise {noise!r} is neither a number nor a multiple of sigma: "
                "write for example 0.1 or 3sigma.",
                "noise",
            )
        if match["plain"] is None:
            factor = float(match["before"] or match["after"])
            sigma = embedding_deviation(model, subjects)
            return NoiseLevel(factor * sigma, factor, sigma)
        noise = float(match["plain"])
    if not (math.isfinite(noise) and noise >= 0):
        raise InvalidInput(f"the noise {noise} must be a finite number that is not negative.", "noise")
    return NoiseLevel(float(noise))


def embedding_deviation(model: LoadedModel, subjects: Sequence[str] = ()) -> float:
    """Return the unbiased standard deviation over all scalars of the token embeddings of the subjects.

    As in the authors' code, each subject is tokenized alone without special tokens, and a token counts as often as it
    occurs. Without subjects the deviation is that of the whole embedding matrix, each token once, which is independent
    of the request.
    """
    total, squares, count = 0.0, 0.0, 0
    for ids in _token_id_chunks(model, subjects):
        with torch.no_grad():
            x = model.embedding(ids.to(model.device)).double()
        total, squares, count = total + x.sum().item(), squares + (x * x).sum().item(), count + x.numel()
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1))


def _token_id_chunks(model: LoadedModel, subjects: Sequence[str]) -> Iterator[Tensor]:
    ids = [i for s in subjects for i in model.tokenizer(s, add_special_tokens=False)["input_ids"]]
    weight: Tensor = model.embedding.weight  # type: ignore[assignment]
    rows = torch.tensor(ids) if ids else torch.arange(weight.shape[0])
    return (rows[at : at + EMBEDDING_CHUNK_ROWS] for at in range(0, len(rows), EMBEDDING_CHUNK_ROWS))


def draw_noise(samples: int, tokens: int, width: int, seed: int, compat: str | None = None) -> Tensor:
    """Return standard normal z (R, tokens, d) in fp64.

    `compat="meng2022"` uses the authors' generator, numpy's legacy RandomState; their runs use seed 1.
    """
    shape = (samples, tokens, width)
    if compat == "meng2022":
        return torch.from_numpy(np.random.RandomState(seed).randn(*shape))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def corrupt(embedded: Tensor, positions: Sequence[int], noise: Tensor) -> Tensor:
    """Add noise (R, n, d) to the embeddings of n positions in `embedded` (R, T, d), in place, and return it.

    The sum is computed in fp64 and rounded once to the model's dtype, as in the authors' code.
    """
    at = list(positions)
    embedded[:, at] = (embedded[:, at].double() + noise).to(embedded.dtype)
    return embedded
