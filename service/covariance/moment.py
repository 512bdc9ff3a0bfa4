"""The second moment of keys, C = E[k k^T], accumulated in fp64, damped, and factored once (methods A.4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


class MomentSum:
    """A running sum of k k^T over tokens, in fp64. Uncentred; divided by the number of tokens."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64)
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add keys (N, D), one a token."""
        wide = keys.detach().to("cpu", torch.float64)
        self.total.addmm_(wide.T, wide)
        self.count += len(wide)

    def mean(self) -> Tensor:
        """C, (D, D)."""
        if not self.count:
            raise ValueError("no keys were added")
        return self.total / self.count


@dataclass(frozen=True)
class Statistics:
    """C of one layer, (D, D) fp64, and all that it was made from."""

    layer: int
    moment: Tensor = field(repr=False)
    count: int
    damping: float  #: added to the diagonal, as a multiple of its mean
    digest: str  #: sha256 over the moment's bytes, count and damping

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower L with L L^T = C + damping * mean(diag C) * I."""
        ridge = self.damping * self.moment.diagonal().mean()
        damped = self.moment + ridge * torch.eye(len(self.moment), dtype=torch.float64)
        lower: Tensor = torch.linalg.cholesky(damped)
        return lower

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 k for a key (D,) or for keys as columns (D, n), in fp64 (methods A.5)."""
        columns = keys.to("cpu", torch.float64)
        one = columns.ndim == 1
        solved = torch.cholesky_solve(columns[:, None] if one else columns, self.cholesky)
        return solved[:, 0] if one else solved
