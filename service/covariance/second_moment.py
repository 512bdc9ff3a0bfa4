"""The second moment of keys, C = E[k k^T], accumulated in fp64, damped, and factored once (methods A.4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from service.models.precision import fp64_device

MAX_BLOCKS = 6  # C is accumulated in so many columns of blocks, each from its diagonal down
MIN_BLOCK_WIDTH = 256  # a block is not narrower


class SecondMomentAccumulator:
    """A running sum of k k^T over tokens. Uncentred; divided by the number of tokens.

    Keys are widened and multiplied in fp64 where they are, so that they never travel; only the finished moment comes to
    the CPU. fp64 has no reduced form on any device (TF32 is a mode of fp32 products), so that an entry over N tokens is
    within N 2^-53 / (1 - N 2^-53) of the mean of |k_i k_j|, whatever the batches were: 1e-8 for 1e8 tokens. C is symmetric,
    and the blocks above the diagonal are not computed: with b columns of blocks (1 + 1/b) / 2 of the products are.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.device = fp64_device(torch.device(device))
        self.total = torch.zeros(
            size, size, dtype=torch.float64, device=self.device
        )  # read from the diagonal down
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add keys (N, D), one a token."""
        wide = keys.detach().to(self.device, torch.float64)
        for block in self._blocks():
            self.total[block.start :, block].addmm_(wide[:, block.start :].T, wide[:, block])
        self.count += len(wide)

    def mean(self) -> Tensor:
        """C, (D, D), on the CPU."""
        if not self.count:
            raise ValueError("no keys were added")
        moment = (self.total / self.count).cpu()
        for block in self._blocks():
            diagonal_block = moment[block, block]
            moment[block, block] = diagonal_block.tril() + diagonal_block.tril(-1).T
            moment[block, block.stop :] = moment[block.stop :, block].T
        return moment

    def _blocks(self) -> list[slice]:
        """The columns, cut into blocks."""
        size = len(self.total)
        step = max(MIN_BLOCK_WIDTH, -(-size // MAX_BLOCKS))
        return [slice(at, min(at + step, size)) for at in range(0, size, step)]


@dataclass(frozen=True)
class KeyStatistics:
    """C of one layer, (D, D) fp64, and all that it was made from."""

    layer: int
    moment: Tensor = field(repr=False)
    count: int
    damping: float  #: added to the diagonal, as a multiple of its mean
    digest: str  #: sha256 over the moment's bytes, count and damping

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower L with L L^T = C + damping * mean(diag C) * I."""
        damped = self.moment.clone()
        damped.diagonal().add_(self.damping * self.moment.diagonal().mean())
        lower: Tensor = torch.linalg.cholesky(damped)
        return lower

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 k for a key (D,) or for keys as columns (D, n), in fp64 (methods A.5).

        Two triangular solves, which read L where it is. `cholesky_solve` gives the same bits, but copies L each time: for
        one key the copy costs several times the solve, and tens of times where its pages are not yet mapped.
        """
        columns = keys.to("cpu", torch.float64)
        single_key = columns.ndim == 1
        lower = self.cholesky
        half = torch.linalg.solve_triangular(lower, columns[:, None] if single_key else columns, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        return solved[:, 0] if single_key else solved

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,), ascending, and eigenvectors (D, D) as columns of C, undamped."""
        values, vectors = torch.linalg.eigh(self.moment)
        return values, vectors

    def projection_rank(self, threshold: float) -> int:
        """How many directions the projection keeps; all or none of D means that it says nothing."""
        return int((self.spectrum[0] < threshold).sum())

    def project(self, keys: Tensor, threshold: float) -> Tensor:
        """P k for a key (D,) or keys as columns (D, n), in fp64: onto the directions in which E[(k^T e)^2] < threshold (AlphaEdit,
        Fang et al. 2025, Eq. 8; methods C.3)."""
        null = self.spectrum[1][:, : self.projection_rank(threshold)]
        projected: Tensor = null @ (null.T @ keys.to("cpu", torch.float64))
        return projected
