"""The second moment of keys, C = E[k k^T] (Meng et al. 2022, Eq. 2), accumulated in fp64, damped, and factorized
once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from service.models.precision import fp64_device

MAX_BLOCKS = 6  # columns of blocks in which C is accumulated, each from its diagonal down
MIN_BLOCK_WIDTH = 256  # minimum width of a block


class SecondMomentAccumulator:
    """A running sum of k k^T over tokens. The moment is uncentered and divided by the number of tokens.

    Keys are converted to fp64 and multiplied on their device; only the finished moment is copied to the CPU. No
    device has a reduced form of fp64 (TF32 is a mode of fp32 products), so that the error of an entry over N tokens
    is at most N 2^-53 / (1 - N 2^-53) times the mean of |k_i k_j|, for any batches: 1e-8 for 1e8 tokens. C is
    symmetric, and the blocks above the diagonal are not computed: with b columns of blocks the share (1 + 1/b) / 2 of
    the products is.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.device = fp64_device(torch.device(device))
        self.total = torch.zeros(
            size, size, dtype=torch.float64, device=self.device
        )  # only the blocks from the diagonal down are used
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add the keys (N, D) of N tokens."""
        wide = keys.detach().to(self.device, torch.float64)
        for block in self._blocks():
            self.total[block.start :, block].addmm_(wide[:, block.start :].T, wide[:, block])
        self.count += len(wide)

    def mean(self) -> Tensor:
        """Return C (D, D) on the CPU."""
        if not self.count:
            raise ValueError("no keys were added")
        moment = (self.total / self.count).cpu()
        for block in self._blocks():
            diagonal_block = moment[block, block]
            moment[block, block] = diagonal_block.tril() + diagonal_block.tril(-1).T
            moment[block, block.stop :] = moment[block.stop :, block].T
        return moment

    def _blocks(self) -> list[slice]:
        """Return the blocks of columns."""
        size = len(self.total)
        step = max(MIN_BLOCK_WIDTH, -(-size // MAX_BLOCKS))
        return [slice(at, min(at + step, size)) for at in range(0, size, step)]


@dataclass(frozen=True)
class KeyStatistics:
    """The second moment C of one layer's keys, (D, D) in fp64, with the values that identify it."""

    layer: int
    moment: Tensor = field(repr=False)
    count: int
    damping: float  #: added to the diagonal, as a multiple of its mean
    digest: str  #: sha256 over the moment's bytes, count and damping

    @cached_property
    def cholesky(self) -> Tensor:
        """The lower triangular L with L L^T = C + damping * mean(diag C) * I."""
        damped = self.moment.clone()
        damped.diagonal().add_(self.damping * self.moment.diagonal().mean())
        lower: Tensor = torch.linalg.cholesky(damped)
        return lower

    def solve(self, keys: Tensor) -> Tensor:
        """Return C^-1 k for a key (D,) or for keys as columns (D, n), in fp64.

        Two triangular solves read L in place. `cholesky_solve` gives the same bits but copies L each time, which
        costs several times as much as the solve for one key, and tens of times as much when the pages of L are not
        yet mapped.
        """
        columns = keys.to("cpu", torch.float64)
        single_key = columns.ndim == 1
        lower = self.cholesky
        half = torch.linalg.solve_triangular(lower, columns[:, None] if single_key else columns, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        return solved[:, 0] if single_key else solved

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues (D,), ascending, and the eigenvectors (D, D), as columns, of the undamped C."""
        values, vectors = torch.linalg.eigh(self.moment)
        return values, vectors

    def projection_rank(self, threshold: float) -> int:
        """Return the number of directions whose second moment is below `threshold`: the rank of P."""
        return int((self.spectrum[0] < threshold).sum())

    def project(self, keys: Tensor, threshold: float) -> Tensor:
        """Return P k for a key (D,) or keys as columns (D, n), in fp64. P projects onto the directions e with E[(k^T
        e)^2] < threshold (AlphaEdit, Fang et al. 2025, Eq. 8)."""
        null = self.spectrum[1][:, : self.projection_rank(threshold)]
        projected: Tensor = null @ (null.T @ keys.to("cpu", torch.float64))
        return projected
