"""The corruption of a subject: how strong the noise is, and which noise (methods B.1).

Noise is paired: one block z of shape (R, e - b, d) is drawn before anything runs and every pass of a trace
uses it, so that two cells differ by what was restored and by nothing else. It is drawn in C order with the
sample slowest, so the first samples stay the same when more are asked for.
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
EMBEDDING_CHUNK_ROWS = 4096  # rows of the embedding read at once


@dataclass(frozen=True)
class NoiseLevel:
    """The noise's standard deviation: `factor` times `sigma` when the embeddings were measured."""

    value: float
    factor: float | None = None
    sigma: float | None = None


def parse_noise_level(model: LoadedModel, noise: float | str, subjects: Sequence[str] = ()) -> NoiseLevel:
    """Read a number, or a multiple of the embeddings' deviation: "3sigma" or, as in the reference, "s3"."""
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
    """Standard deviation (unbiased) over all scalars of the token embeddings of the subjects.

    Each subject is tokenised alone and without special tokens, and a token counts as often as it occurs: the
    reference's rule. Without subjects the deviation is that of the whole embedding matrix, each token once,
    which needs no list and does not depend on what was asked.
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
    """Standard normal z (R, e - b, d) in fp64.

    `compat="meng2022"` is the reference's stream, numpy's legacy RandomState; its runs are those of seed 1.
    """
    shape = (samples, tokens, width)
    if compat == "meng2022":
        return torch.from_numpy(np.random.RandomState(seed).randn(*shape))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def corrupt(embedded: Tensor, subject: tuple[int, int], noise: Tensor) -> Tensor:
    """Add noise (R, e - b, d) to embeddings (R, T, d) at the subject. Writes into `embedded`; returns it.

    The sum is formed in fp64 and rounded once to the model's dtype, as the reference does.
    """
    positions = slice(*subject)
    embedded[:, positions] = (embedded[:, positions].double() + noise).to(embedded.dtype)
    return embedded
