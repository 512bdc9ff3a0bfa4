"""The next token from logits. Pure functions; all arithmetic in float64 on the CPU.

The order is that of transformers: temperature, then top-k, then top-p of what is left. A token is drawn by the inverse
of the cumulative distribution in the order of token ids, from one uniform number of the request's own generator, so
that what a request says depends on its logits and its seed and on nothing that runs beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.requests import Sampling


def distribution(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """p (V,) in float64 from logits (V,) at a temperature above 0; tokens that are cut have p = 0.

    `top_k` keeps exactly k tokens (of equals the lower id); `top_p` keeps the smallest set of the most probable
    tokens whose mass reaches it, at least one.
    """
    scores = logits.detach().double().cpu()
    p = ((scores - scores.max()) / temperature).softmax(-1)
    if top_k is None and top_p >= 1:
        return p
    best, ids = p.sort(descending=True, stable=True)
    best = best[:top_k]
    if top_p < 1:
        before = (best / best.sum()).cumsum(-1) - best / best.sum()  # mass of all more probable tokens
        best = best[: max(1, int((before < top_p).sum()))]
    kept = torch.zeros_like(p)
    kept[ids[: len(best)]] = best
    return kept / kept.sum()


def draw(p: Tensor, uniform: float) -> int:
    """The token at which the cumulative distribution of p (V,) passes `uniform` in [0, 1)."""
    cumulative = p.cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, int(p.nonzero()[-1]))  # rounding must not lead past the last possible token


def generator(seed: int) -> torch.Generator:
    """A request's own source of numbers, on the CPU whatever the model's device."""
    return torch.Generator().manual_seed(seed)


def choose(logits: Tensor, sampling: Sampling, numbers: torch.Generator) -> int:
    """The next token from logits (V,). Temperature 0 takes the most probable (of equals the lower id)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return draw(p, torch.rand((), dtype=torch.float64, generator=numbers).item())
