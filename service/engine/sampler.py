"""Samples the next tokens from logits, for all sequences of a batch at once. All arithmetic is float64.

The order is that of transformers: temperature, then top-k, then top-p of the rest. A token is sampled by the inverse of
the cumulative distribution in the order of token ids, from one uniform number of the request's own. So the output of a
request depends on its logits and its seed, and not on the rest of the batch.

Nothing here waits for the device; the caller's transfer of the tokens does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from service.schemas import Sampling

INVALID_TOKEN = -1  # the token of a sequence whose logits are not finite
MIN_TEMPERATURE = sys.float_info.min  # smaller numbers are 0 where subnormal numbers are flushed
FIRST_TOP_K = 64  # most probable tokens that are searched first for a nucleus


def uniforms(seed: int, count: int) -> list[float]:
    """Return `count` numbers in [0, 1), one for each token to generate. A longer list starts with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator).tolist()


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one of several choices. Choice 0 has the request's own seed, so it equals a request for one
    choice."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {choice}".encode()).digest()[:8]) >> 1


def softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return p (B, V) in float64 from logits (B, V) at temperatures (B, 1) in float64, above 0.

    The largest logit is subtracted before the division, which would overflow at the smallest temperatures.
    """
    precise = logits.to(torch.float64, copy=True)
    return precise.sub_(precise.max(-1, keepdim=True).values).div_(temperature).softmax(-1)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens (B,) at which the cumulative sums of p (B, V), of any positive mass, exceed their shares
    `uniform` (B,); INVALID_TOKEN where the mass is not a positive number."""
    cumulative = p.cumsum(-1)
    mass = cumulative[:, -1:]
    # rounding must not select a token after the last possible one
    share = torch.minimum(uniform[:, None] * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    tokens = torch.searchsorted(cumulative, share, right=True)[:, 0]
    return tokens.where((mass[:, 0] > 0) & mass[:, 0].isfinite(), INVALID_TOKEN)


class Sampler:
    """The sampling parameters of a batch as tensors on the model's device. Rebuilt when the sequences change.

    `top_k` keeps exactly k tokens (of equal ones the lower id); `top_p` keeps the smallest set of the most probable
    tokens whose mass reaches it, at least one. Temperature 0 takes the most probable token (of equal ones the lower
    id).
    """

    def __init__(self, params: Sequence[Sampling], device: torch.device) -> None:
        sampled = [i for i, a in enumerate(params) if a.temperature > 0]
        filtered = [
            i for i, row in enumerate(sampled) if params[row].top_k is not None or params[row].top_p < 1
        ]
        filtered_params = [params[sampled[i]] for i in filtered]
        self._sampled_rows = to_device_async(sampled, torch.long, device)
        self._temperature = _column([max(params[i].temperature, MIN_TEMPERATURE) for i in sampled], device)
        self._filtered_rows = to_device_async(filtered, torch.long, device)
        self._top_k = _column([a.top_k or torch.inf for a in filtered_params], device)
        self._top_p = _column([a.top_p if a.top_p < 1 else torch.inf for a in filtered_params], device)
        self._avoid_sync = (
            device.type != "cpu"
        )  # compute everything that may be needed instead of asking the device
        self._max_top_k = max((a.top_k or 0 for a in filtered_params), default=0)
        self._has_open_nucleus = any(a.top_k is None for a in filtered_params)  # its size depends on p

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return the tokens (B,) for logits (B, V) and one uniform number each (B,); INVALID_TOKEN where logits are not
        finite."""
        peak, tokens = logits.max(-1)
        if len(self._sampled_rows):
            p = self.probabilities(logits)
            tokens = tokens.index_copy(0, self._sampled_rows, draw(p, uniforms[self._sampled_rows]))
        return tokens.where(peak.isfinite(), INVALID_TOKEN)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distributions (S, V) of the sequences that sample, each of any positive mass; removed tokens have
        0."""
        all_sampled = len(self._sampled_rows) == len(logits)
        p = softmax(logits if all_sampled else logits[self._sampled_rows], self._temperature)
        if len(self._filtered_rows) == len(p):
            return self._filter(p)
        return (
            p.index_copy(0, self._filtered_rows, self._filter(p[self._filtered_rows]))
            if len(self._filtered_rows)
            else p
        )

    def _filter(self, p: Tensor) -> Tensor:
        """Return p (C, V) of the sequences with top-k or top-p, with 0 for the removed tokens."""
        top = self._top_candidates(p)
        within_top_k = torch.arange(top.shape[1], device=p.device) < self._top_k
        sums = top.where(within_top_k, 0).cumsum(-1)
        reached = self._top_p * sums[:, -1:].where(self._top_k.isfinite(), 1)
        mass_before = sums - top  # of all more probable tokens
        count = (within_top_k & (mass_before < reached)).sum(-1, keepdim=True).clamp(min=1)
        threshold = top.gather(-1, count - 1)
        mask = p >= threshold
        if self._avoid_sync or bool((mask.sum(-1, keepdim=True) > count).any()):
            tied = p == threshold
            tied_count = count - (p > threshold).sum(-1, keepdim=True)
            mask &= ~tied | (tied.cumsum(-1) <= tied_count)  # of equal ones the lower ids
        return p.where(mask, 0)

    def _top_candidates(self, p: Tensor) -> Tensor:
        """Return the largest entries of p in order, at least all that may be kept. The number that `top_p` needs
        depends on p; searching in growing blocks is faster than sorting."""
        size, count = p.shape[1], self._max_top_k
        if self._has_open_nucleus:
            count = size if self._avoid_sync else max(count, FIRST_TOP_K)
        while True:
            top = p.topk(min(count, size)).values
            if count >= size or not self._has_open_nucleus or self._covers_top_p(top):
                return top
            count *= 4

    def _covers_top_p(self, best: Tensor) -> bool:
        reached = best.sum(-1, keepdim=True) >= self._top_p
        return bool((reached | self._top_k.isfinite()).all())


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device_async(values, torch.float64, device)[:, None]


def to_device_async(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
