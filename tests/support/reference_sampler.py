"""Sampling of one sequence: the definition that the batched sampler must equal token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from service.schemas import Sampling


def distribution(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Return p (V,) in fp64 from logits (V,): temperature, stable sort, top k, smallest set of mass p."""
    scores = logits.double()
    p = ((scores - scores.max()) / temperature).softmax(-1)
    if top_k is None and top_p >= 1:
        return p
    best, ids = p.sort(descending=True, stable=True)
    best = best[:top_k]
    if top_p < 1:
        before = (best / best.sum()).cumsum(-1) - best / best.sum()
        best = best[: max(1, int((before < top_p).sum()))]
    truncated = torch.zeros_like(p)
    truncated[ids[: len(best)]] = best
    return truncated / truncated.sum()


def inverse_cdf(p: Tensor, uniform: float) -> int:
    """Return the token at which the cumulative distribution of p (V,) exceeds `uniform` in [0, 1)."""
    cumulative = p.cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, int(p.nonzero()[-1]))


def sample_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token from logits (V,), with the next uniform number of a generator."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return inverse_cdf(p, torch.rand((), dtype=torch.float64, generator=generator).item())
