"""Linear systems in bounded steps: service.weights.solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.kit.steps import run_to_completion
from service.weights import solve as solve_module
from service.weights.solve import (
    factorize,
    factorize_any_rank,
    single_threaded,
    solve,
    solve_any_rank,
    solve_least_norm,
)


def system(n: int, m: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix (n, n) that is not symmetric and needs pivoting, and right-hand sides (n, m)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, generator=g).double(), torch.randn(n, m, generator=g).double()


def solution(matrix: Tensor, right: Tensor) -> Tensor:
    return run_to_completion(solve(run_to_completion(factorize(matrix)), right))


@pytest.mark.parametrize("n", [1, 2, 65, 300, 700])
def test_an_unblocked_system_has_the_bytes_of_one_lapack_call(n: int) -> None:
    """Up to UNBLOCKED_SIZE rows the solution equals torch.linalg.solve bit for bit."""
    matrix, right = system(n)
    with single_threaded():
        expected = torch.linalg.solve(matrix, right)
    found = solution(matrix, right)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("n", [9, 64, 100, 130])
def test_blocked_factors_are_lapack_factors(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The blocked factorization gives P, L and U of the same matrix with partial pivoting, and the same solution."""
    monkeypatch.setattr(solve_module, "UNBLOCKED_SIZE", 8)
    monkeypatch.setattr(solve_module, "PANEL_WIDTH", 16)
    monkeypatch.setattr(solve_module, "UPDATE_COLUMNS", 24)
    monkeypatch.setattr(solve_module, "SOLVE_COLUMNS", 16)
    matrix, right = system(n)
    lu, pivots = run_to_completion(factorize(matrix))
    expected_lu, expected_pivots = torch.linalg.lu_factor(matrix)
    assert torch.equal(pivots, expected_pivots)
    torch.testing.assert_close(lu, expected_lu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        solution(matrix, right), torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Replicas with different numbers of threads agree on every byte, also when the factorization is blocked."""
    monkeypatch.setattr(solve_module, "UNBLOCKED_SIZE", 128)
    matrix, right = system(300)
    reference = solution(matrix, right)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(solution(matrix, right), reference)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_matrix_is_not_changed() -> None:
    """A factorization leaves the matrix that it is given unchanged."""
    matrix, _ = system(50)
    before = matrix.clone()
    run_to_completion(factorize(matrix))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("unblocked", [8, 1024])
def test_a_singular_matrix_raises(monkeypatch: pytest.MonkeyPatch, unblocked: int) -> None:
    """A singular matrix raises LinAlgError with either algorithm."""
    monkeypatch.setattr(solve_module, "UNBLOCKED_SIZE", unblocked)
    monkeypatch.setattr(solve_module, "PANEL_WIDTH", 4)
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        run_to_completion(factorize(torch.zeros(20, 20, dtype=torch.float64)))


def any_rank_solution(matrix: Tensor, right: Tensor) -> Tensor:
    return run_to_completion(solve_any_rank(run_to_completion(factorize_any_rank(matrix)), right))


def test_a_regular_matrix_of_any_rank_has_the_bytes_of_its_factors() -> None:
    """Where the matrix is regular, the solution is that of its LU factors bit for bit."""
    matrix, right = system(30)
    assert torch.equal(any_rank_solution(matrix, right), solution(matrix, right))


@pytest.mark.parametrize("nearly", [0.0, 1e-200])
def test_a_singular_matrix_has_the_solution_of_least_norm(nearly: float) -> None:
    """A matrix that is singular, or so up to rounding, gives the smallest x among the best ones."""
    matrix = torch.tensor([[1.0, 0.0], [0.0, nearly]], dtype=torch.float64)
    right = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(any_rank_solution(matrix, right), torch.tensor([[2.0], [0.0]]).double())


@pytest.mark.parametrize("number", [0.0, 5e-324, 1e-310, -1e-200])
def test_a_matrix_without_numbers_has_the_solution_zero(number: float) -> None:
    """A matrix whose numbers are all below the products of fp32 numbers counts as 0."""
    right = torch.full((3, 2), 1e30, dtype=torch.float64)
    found = any_rank_solution(torch.full((3, 3), number, dtype=torch.float64), right)
    assert torch.equal(found, torch.zeros_like(right))


def test_growth_in_the_factors_does_not_reach_the_solution() -> None:
    """A matrix whose LU factors overflow has a finite solution that solves the system."""
    n = 1100
    matrix = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    matrix[:, -1] = 1
    right = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    found = any_rank_solution(matrix, right)
    assert found.isfinite().all()
    torch.testing.assert_close(matrix @ found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-90, 1.0, 1e95])
def test_a_large_singular_matrix_is_solved_in_steps(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Above LEAST_NORM_SIZE a singular system is solved in steps, whatever the size of its numbers. The solution is
    nearly that of least norm."""
    monkeypatch.setattr(solve_module, "LEAST_NORM_SIZE", 8)
    monkeypatch.setattr(solve_module, "PANEL_WIDTH", 16)
    monkeypatch.setattr(solve_module, "UPDATE_COLUMNS", 24)
    monkeypatch.setattr(solve_module, "SOLVE_COLUMNS", 16)
    keys = torch.randn(100, 150, generator=torch.Generator().manual_seed(0)).double()
    keys[-1] = keys[0]
    gram = keys @ keys.T
    _, right = system(100)
    expected = torch.linalg.lstsq(gram, right, rcond=1e-12, driver="gelsd").solution
    steps = solve_least_norm(gram * scale, right)
    torch.testing.assert_close(run_to_completion(steps) * scale, expected, rtol=1e-4, atol=1e-4)
    assert len(list(solve_least_norm(gram, right))) > 30


def test_singular_values_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """When LAPACK finds no singular values, the system is damped instead."""

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("it did not converge")  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "lstsq", fail)
    found = any_rank_solution(torch.ones(2, 2, dtype=torch.float64), torch.tensor([[1.0], [3.0]]).double())
    torch.testing.assert_close(found, torch.ones(2, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)
