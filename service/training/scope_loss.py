"""The loss of a scope classifier, and the choice of its threshold. Pure functions.

With phi = exp(-s d^2) for the squared distances d^2 of pairs of a text and a record (Mitchell et al. 2022, Section 3):

    L = -1/2 mean_{within scope} log phi - 1/2 mean_{out of scope} log(1 - phi)

Both kinds of pairs count the same, however many there are of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_EXPONENT = 1e-6  # of s d^2 of a pair out of scope: the loss of two equal texts stays finite


def balanced_loss(exponents: Tensor, within: Tensor) -> Tensor:
    """Return L () of pairs with s d^2 (n,) that are within the scope of the record or not (n,). A kind without pairs
    has no share."""
    inside, outside = exponents[within], exponents[~within]
    loss = exponents.new_zeros(())
    if len(inside):
        loss = loss + inside.mean() / 2
    if len(outside):
        loss = loss - torch.log(-torch.expm1(-outside.clamp(min=MIN_EXPONENT))).mean() / 2
    return loss


def choose_threshold(outside: Tensor, rate: float) -> float:
    """Return the least threshold at which at most the share `rate` of pairs out of scope opens, from their phi (n,) in
    fp64. A pair opens if its phi is at least the threshold. It is never above 1, and 0 without pairs.

    With ties at phi = 1, which no threshold keeps closed, the share can be larger.
    """
    allowed = math.floor(rate * len(outside))
    if allowed >= len(outside):
        return 0.0
    largest_closed = float(outside.double().sort(descending=True).values[allowed])
    return min(1.0, math.nextafter(largest_closed, math.inf))


def share_open(similarities: Tensor, threshold: float) -> float | None:
    """Return the share of pairs that open; None without pairs."""
    return float((similarities >= threshold).double().mean()) if len(similarities) else None
