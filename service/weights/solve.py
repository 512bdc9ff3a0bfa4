"""Dense linear systems in bounded steps, with the same bytes on every replica.

All of it is fp64 on one thread: the last bits of a factorization depend on the number of threads.

A matrix of at most `UNBLOCKED_SIZE` rows is factorized by one LAPACK call. A larger one is factorized by the blocked
right-looking LU with partial pivoting (Golub and Van Loan, Matrix Computations, section 3.2.11): panels of
`PANEL_WIDTH` columns are factorized by LAPACK, then the columns to the right are updated, `UPDATE_COLUMNS` at a time.
The block sizes are part of the definition of a version's bytes: every replica uses these, whatever its device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from service.kit.steps import Phase, Progress, Stepper

UNBLOCKED_SIZE = 1024  # rows of a matrix that one step factorizes
PANEL_WIDTH = 256  # columns of a larger matrix that one step factorizes
UPDATE_COLUMNS = 512  # columns that one step updates
RANK_TOLERANCE = 1e-12  # of the largest singular value, below which a singular value counts as 0
ZERO_MATRIX = 1e-150  # largest number of a matrix that counts as 0; products of fp32 numbers are above it
LEAST_NORM_SIZE = 256  # rows of a singular matrix that one step solves with singular values
DAMPING = 1e-10  # of a large singular matrix A, as a multiple of the largest diagonal entry of A^T A
MAX_SOLUTION = 1e30  # a larger number in a solution means that the matrix is singular up to rounding
SOLVE_COLUMNS = (
    64  # right-hand sides that one step solves for, where the matrix is larger than UNBLOCKED_SIZE
)


class LuFactors(NamedTuple):
    """P A = L U as LAPACK packs it: `lu` (n, n), and the row that each row was exchanged with, `pivots` (n,), from
    1."""

    lu: Tensor
    pivots: Tensor


@contextmanager
def single_threaded() -> Iterator[None]:
    """Use one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def factorize(matrix: Tensor) -> Stepper[LuFactors]:
    """Return the LU factors of a matrix (n, n) in fp64. Raises LinAlgError when it is singular."""
    n = len(matrix)
    if n <= UNBLOCKED_SIZE:
        factors = _lapack_factors(matrix)
        yield Progress(Phase.SOLVE, n, n)
        return factors
    matrix = matrix.mT.contiguous().mT  # by columns, as LAPACK reads it
    yield Progress(Phase.SOLVE, 0, n)
    pivots = torch.empty(n, dtype=torch.int32)
    for start in range(0, n, PANEL_WIDTH):
        end = min(start + PANEL_WIDTH, n)
        panel, local_pivots = _lapack_factors(matrix[start:, start:end])
        matrix[start:, start:end] = panel
        pivots[start:end] = local_pivots + start
        targets, sources = _exchanges(local_pivots, start)
        yield Progress(Phase.SOLVE, end, n)
        lower = panel[: end - start]
        for at in [*_slices(0, start), *_slices(end, n)]:
            columns = matrix[:, at]
            columns[targets] = columns[sources]
            if at.start >= end:
                with single_threaded():
                    top = columns[start:end]
                    top.copy_(torch.linalg.solve_triangular(lower, top, upper=False, unitriangular=True))
                    columns[end:].addmm_(panel[end - start :], top, alpha=-1)
            yield Progress(Phase.SOLVE, end, n)
    return LuFactors(matrix, pivots)


def solve(factors: LuFactors, right: Tensor) -> Stepper[Tensor]:
    """Return the solution (n, m) of A x = right (n, m)."""
    n, m = right.shape
    step = m if n <= UNBLOCKED_SIZE else SOLVE_COLUMNS
    parts: list[Tensor] = []
    for start in range(0, m, max(1, step)):
        with single_threaded():
            parts.append(torch.linalg.lu_solve(*factors, right[:, start : start + step]))
        yield Progress(Phase.SOLVE, min(start + step, m), m)
    return parts[0] if len(parts) == 1 else torch.cat([part.mT for part in parts]).mT


class AnyRankFactors(NamedTuple):
    """A matrix (n, n) that can be singular, and its LU factors unless it is."""

    matrix: Tensor
    lu: LuFactors | None


def factorize_any_rank(matrix: Tensor) -> Stepper[AnyRankFactors]:
    """Return the factors of a matrix (n, n) in fp64 of any rank. They refer to the matrix, which must not change."""
    with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return AnyRankFactors(matrix, (yield from factorize(matrix)))
    return AnyRankFactors(matrix, None)


def solve_any_rank(factors: AnyRankFactors, right: Tensor) -> Stepper[Tensor]:
    """Return the solution (n, m) of A x = right (n, m), which is finite for every finite A and right.

    It is the solution of least norm where A is singular, or so nearly that the LU factors give numbers above
    MAX_SOLUTION.
    """
    if factors.lu is not None:
        solution = yield from solve(factors.lu, right)
        low, high = map(float, solution.aminmax())
        if low >= -MAX_SOLUTION and high <= MAX_SOLUTION:  # NaN is neither
            return solution
    return (yield from solve_least_norm(factors.matrix, right))


def solve_least_norm(matrix: Tensor, right: Tensor) -> Stepper[Tensor]:
    """Return the x (n, m) of least norm that minimizes |A x - right|, for a matrix (n, n) in fp64 of any rank.

    Singular values below RANK_TOLERANCE of the largest count as 0, and so does a matrix without a number above
    ZERO_MATRIX. A matrix of more than LEAST_NORM_SIZE rows is damped instead, in bounded steps.
    """
    n = len(matrix)
    if float(matrix.abs().max()) < ZERO_MATRIX:
        return torch.zeros_like(right)
    solution = _lapack_least_norm(matrix, right) if n <= LEAST_NORM_SIZE else None
    if solution is None:
        return (yield from _solve_damped(matrix, right))
    yield Progress(Phase.SOLVE, n, n)
    return solution


def _lapack_least_norm(matrix: Tensor, right: Tensor) -> Tensor | None:
    """Return the solution from singular values; None when their iteration does not converge."""
    with single_threaded(), suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return torch.linalg.lstsq(matrix, right, rcond=RANK_TOLERANCE, driver="gelsd").solution  # type: ignore[no-any-return]
    return None


def _solve_damped(matrix: Tensor, right: Tensor) -> Stepper[Tensor]:
    """Return (A^T A + damping I)^-1 A^T right, which is near the x of least norm."""
    n, scale = len(matrix), float(matrix.abs().max())
    matrix = matrix / scale
    yield Progress(Phase.SOLVE, 0, n)
    normal = torch.zeros_like(matrix)
    for rows in _slices(0, n):
        for start in range(0, n, PANEL_WIDTH):
            panel = matrix[start : start + PANEL_WIDTH]
            with single_threaded():
                normal[rows].addmm_(panel[:, rows].T, panel)
            yield Progress(Phase.SOLVE, rows.stop, n)
    normal.diagonal().add_(DAMPING * float(normal.diagonal().max()))
    factors = yield from factorize(normal)
    parts: list[Tensor] = []
    for start in range(0, right.shape[1], SOLVE_COLUMNS):
        with single_threaded():
            part = matrix.T @ (right[:, start : start + SOLVE_COLUMNS] / scale)
        yield Progress(Phase.SOLVE, start, right.shape[1])
        parts.append((yield from solve(factors, part)))
    return torch.cat(parts, 1)


def _lapack_factors(matrix: Tensor) -> LuFactors:
    with single_threaded():
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if int(info):
        raise torch.linalg.LinAlgError("the matrix is singular")  # type: ignore[attr-defined]
    return LuFactors(lu, pivots)


def _exchanges(pivots: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return the rows that change when row start + i is exchanged with row start + pivots[i] - 1, for each i in turn,
    and the rows that they come from."""
    moved: dict[int, int] = {}
    for i, pivot in enumerate(pivots.tolist()):
        a, b = start + i, start + pivot - 1
        moved[a], moved[b] = moved.get(b, b), moved.get(a, a)
    return torch.tensor(list(moved)), torch.tensor(list(moved.values()))


def _slices(start: int, end: int) -> list[slice]:
    return [slice(at, min(at + UPDATE_COLUMNS, end)) for at in range(start, end, UPDATE_COLUMNS)]
