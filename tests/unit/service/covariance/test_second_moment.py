"""The second moment of keys: service.covariance.second_moment."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from service.covariance.second_moment import KeyStatistics, SecondMomentAccumulator


def statistics(moment: torch.Tensor, damping: float = 0.0) -> KeyStatistics:
    return KeyStatistics(0, moment, 10, damping, "digest")


def test_the_moment_is_the_mean_of_outer_products_over_tokens() -> None:
    """C is sum k k^T divided by the number of tokens, for any batches."""
    keys = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    total = SecondMomentAccumulator(6)
    for part in (keys[:7], keys[7:8], keys[8:]):
        total.add(part)
    expected = sum(torch.outer(k, k) for k in keys.double()) / 50
    torch.testing.assert_close(total.mean(), expected, rtol=1e-12, atol=1e-12)
    assert total.count == 50


def test_accumulation_is_in_double_precision() -> None:
    """Many small terms after a large one are not lost, as they would be in fp32."""
    total = SecondMomentAccumulator(1)
    total.add(torch.tensor([[1e4]]))
    for _ in range(100):
        total.add(torch.full((100, 1), 0.1))
    expected = (1e8 + 10000 * float(torch.tensor(0.1)) ** 2) / 10001
    assert total.mean().item() == pytest.approx(expected, rel=1e-11)


def test_every_entry_is_within_its_bound() -> None:
    """The error of an entry over N tokens is at most N 2^-53 / (1 - N 2^-53) times the mean of |k_i k_j|."""
    keys = torch.randn(60, 5, generator=torch.Generator().manual_seed(6)) * torch.tensor(
        [1e-6, 1, 3, 1e3, 1e6]
    )
    total = SecondMomentAccumulator(5)
    for part in keys.split(7):
        total.add(part)
    mean = total.mean()
    exact = [[Fraction(x) for x in row] for row in keys.tolist()]
    error_bound = Fraction(61, 2**53) / (1 - Fraction(61, 2**53))  # one more rounding for the division
    for i in range(5):
        for j in range(5):
            products = [row[i] * row[j] for row in exact]
            error = abs(Fraction(mean[i, j].item()) - sum(products, Fraction()) / 60)
            assert error <= error_bound * sum(map(abs, products), Fraction()) / 60


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700, 1550])
def test_the_half_that_is_left_out_is_the_mirror_of_the_other(size: int) -> None:
    """C is complete and exactly symmetric for any block size."""
    keys = torch.randn(30, size, generator=torch.Generator().manual_seed(7))
    total = SecondMomentAccumulator(size)
    total.add(keys)
    mean, wide = total.mean(), keys.double()
    torch.testing.assert_close(mean, wide.T @ wide / 30, rtol=1e-12, atol=1e-12)
    assert torch.equal(mean, mean.T)
    assert torch.equal(mean, total.mean())


def test_a_device_without_double_precision_leaves_the_sum_to_the_cpu() -> None:
    """A device without fp64 accumulates on the CPU."""
    total = SecondMomentAccumulator(4, "mps")
    total.add(torch.ones(2, 4))
    assert total.total.device.type == "cpu"
    assert total.total.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_gives_the_same_moment() -> None:
    """Keys on an accelerator are accumulated there, to the same C."""
    keys = torch.randn(500, 700, generator=torch.Generator().manual_seed(8))
    here, there = SecondMomentAccumulator(700), SecondMomentAccumulator(700, "cuda")
    here.add(keys)
    there.add(keys.cuda())
    assert there.total.device.type == "cuda"
    torch.testing.assert_close(there.mean(), here.mean(), rtol=1e-12, atol=1e-12)


def test_no_keys_is_an_error() -> None:
    """The moment of no keys is an error."""
    with pytest.raises(ValueError, match="no keys"):
        SecondMomentAccumulator(3).mean()


def test_identity_moment_leaves_the_key() -> None:
    """With C = I the direction is the key itself."""
    key = torch.randn(5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(statistics(torch.eye(5, dtype=torch.float64)).solve(key), key.double())


def test_solve_is_the_damped_inverse() -> None:
    """solve(k) = (C + damping mean(diag C) I)^-1 k, for one key and for columns of keys."""
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moment, keys = a @ a.T, torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(damped) @ keys.double()
    torch.testing.assert_close(statistics(moment, 0.01).solve(keys), expected)
    torch.testing.assert_close(statistics(moment, 0.01).solve(keys[:, 0]), expected[:, 0])


def test_solving_has_the_bits_of_the_library_call() -> None:
    """solve gives the bits of `cholesky_solve`."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(900, 300, dtype=torch.float64, generator=g)
    solved = statistics(a.T @ a / 900, 1e-3)
    for keys in (torch.randn(300, 1, generator=g), torch.randn(300, 7, generator=g)):
        assert torch.equal(solved.solve(keys), torch.cholesky_solve(keys.double(), solved.cholesky))


def test_the_factor_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second solve does not factorize again."""
    solved = statistics(torch.eye(3, dtype=torch.float64))
    first = solved.solve(torch.ones(3))
    monkeypatch.setattr(torch.linalg, "cholesky", None)
    assert torch.equal(first, solved.solve(torch.ones(3)))


def test_damping_makes_a_singular_moment_usable() -> None:
    """Damping keeps the direction finite when C is singular."""
    key = torch.ones(8)
    total = SecondMomentAccumulator(8)
    total.add(key[None])
    assert torch.isfinite(statistics(total.mean(), 1e-3).solve(key)).all()


def test_the_divisor_of_an_update_cannot_vanish() -> None:
    """k^T C^-1 k is positive for every key."""
    g = torch.Generator().manual_seed(4)
    a = torch.randn(6, 6, dtype=torch.float64, generator=g)
    solved = statistics(a @ a.T, 1e-3)
    keys = torch.randn(200, 6, generator=g).double()
    assert all(k @ solved.solve(k) > 0 for k in keys)
    assert any(k @ solved.solve(other) < 0 for k, other in zip(keys, keys.flip(0), strict=True))


def test_the_projection_is_onto_what_is_hardly_used() -> None:
    """P is symmetric and idempotent with the stated rank, and changes the statistics' keys by at most the
    threshold."""
    g = torch.Generator().manual_seed(4)
    keys = torch.randn(200, 12, dtype=torch.float64, generator=g) * torch.logspace(
        -2, 1, 12, dtype=torch.float64
    )
    second = keys.T @ keys / 200
    key_statistics = KeyStatistics(0, second, 200, 1e-3, "")
    threshold = 0.05
    projection = key_statistics.project(torch.eye(12, dtype=torch.float64), threshold)
    torch.testing.assert_close(projection, projection.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-10, atol=1e-12)
    assert float(projection.trace()) == pytest.approx(key_statistics.projection_rank(threshold))
    assert 0 < key_statistics.projection_rank(threshold) < 12
    change = torch.randn(5, 12, dtype=torch.float64, generator=g) @ projection
    assert float(torch.trace(change @ second @ change.T)) <= threshold * float(change.norm() ** 2)
