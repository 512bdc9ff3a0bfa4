"""The remaining capacity of a layer: service.weights.capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.kit.steps import run_to_completion
from service.models.loading import WeightRef
from service.weights.capacity import (
    average_capacities,
    average_capacity,
    measure_capacities,
    remaining_capacity,
)
from service.weights.factors import Association, DenseUpdate, EditUpdate, SolveMode
from service.weights.solve import single_threaded

D, N = 12, 5


def moment(seed: int = 0) -> Tensor:
    mixed = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double()
    return mixed @ mixed.T + 0.1 * torch.eye(D)


def keys(n: int = N, seed: int = 1) -> Tensor:
    """Return n random keys (n, D)."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).double()


def association_at(key: Tensor, c: Tensor, subject: str, form: str = "joint", layer: int = 0) -> Association:
    return Association(
        subject, subject, layer, key, torch.linalg.solve(c, key), torch.ones(3), SolveMode(form)
    )


def capacities_of(new_updates: Sequence[EditUpdate], others: Sequence[EditUpdate]) -> dict[int, float]:
    (capacities,) = run_to_completion(measure_capacities([new_updates], others))
    return capacities


def capacity_by_projection(c: Tensor, active_keys: Tensor, key: Tensor) -> float:
    """1 - |projection|^2 / |k|^2 in the metric C^-1: the keys whitened by C = L L^T, then plain least squares."""
    lower = torch.linalg.cholesky(c)
    white = torch.linalg.solve_triangular(lower, torch.stack([*active_keys, key], 1), upper=False)
    basis, target = white[:, :-1], white[:, -1]
    projected = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
    return 1 - float(projected @ projected / (target @ target))


def test_capacity_of_several_keys_is_the_least() -> None:
    """An edit with several keys at a layer has the capacity of the one with the least. Products that are not solved
    occupy nothing and need no room."""
    c = moment()
    active = [association_at(k, c, f"s{i}") for i, k in enumerate(keys())]
    new = [association_at(k, c, "new") for k in keys(3, 7)]
    each = [capacities_of([a], active)[0] for a in new]
    assert len(set(each)) == 3
    together = [replace(a, edit="new", number=n) for n, a in enumerate(new)]
    assert capacities_of(together, active) == {0: min(each)}
    unsolved = [replace(a, solve_mode=SolveMode("kn")) for a in together]
    assert capacities_of(unsolved, active) == {}
    assert capacities_of([new[0]], unsolved) == {0: 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_capacity_equals_projection_residual(seed: int) -> None:
    """Without a ridge the capacity is the relative residual of the C^-1-orthogonal projection onto the active
    keys."""
    c, active_keys, key = moment(seed), keys(seed=seed + 10), keys(1, seed + 20)[0]
    directions = torch.linalg.solve(c, active_keys.T).T
    capacity = remaining_capacity(
        active_keys @ directions.T, directions @ key, float(key @ torch.linalg.solve(c, key)), ridge=0.0
    )
    assert capacity == pytest.approx(capacity_by_projection(c, active_keys, key), abs=1e-9)
    capacities = capacities_of(
        [association_at(key, c, "new")], [association_at(k, c, str(i)) for i, k in enumerate(active_keys)]
    )
    assert capacities[0] == pytest.approx(capacity, abs=2e-2) and 0 <= capacities[0] <= 1


def test_capacity_limits() -> None:
    """The capacity is 1 without other edits, about 0 for a linear combination of active keys, and 1 for a key
    that is C^-1-orthogonal to them."""
    c, active_keys = moment(), keys(2)
    others = [association_at(k, c, str(i)) for i, k in enumerate(active_keys)]
    assert capacities_of([association_at(active_keys[0], c, "new")], []) == {0: 1.0}
    assert capacities_of([association_at(active_keys[0] - 2 * active_keys[1], c, "new")], others)[0] < 1e-2
    directions = torch.linalg.solve(c, active_keys.T).T
    free = torch.linalg.svd(directions).Vh[-1]
    assert capacities_of([association_at(free, c, "new")], others)[0] == pytest.approx(1.0, abs=1e-9)


def test_which_updates_occupy_capacity() -> None:
    """Edits of the same subject, of another layer or of another metric, and dense updates, occupy no
    capacity."""
    c, key = moment(), keys(1)[0]
    active_updates: list[EditUpdate] = [
        association_at(key, c, "new"),
        association_at(key, c, "a", layer=1),
        association_at(key, c, "b", "alphaedit"),
        DenseUpdate("c", "c", WeightRef(0), torch.zeros(3, D)),
    ]
    assert capacities_of([association_at(key, c, "new")], active_updates) == {0: 1.0}
    assert capacities_of([DenseUpdate("c", "c", WeightRef(0), torch.zeros(3, D))], active_updates) == {}
    assert (
        capacities_of(
            [association_at(key, c, "new", "memit")], [*active_updates, association_at(key, c, "d")]
        )[0]
        < 1e-2
    )


def test_average_capacity_of_n_keys() -> None:
    """For keys drawn from the statistics, n active keys occupy n / D of the capacity on average, weighted by
    length."""
    c, active_keys = moment(), keys(3)
    directions = torch.linalg.solve(c, active_keys.T).T
    gram = active_keys @ directions.T
    assert average_capacity(gram, D, ridge=0.0) == pytest.approx(1 - 3 / D)
    samples = keys(20_000, 7) @ torch.linalg.cholesky(c).T
    own = (samples * torch.linalg.solve(c, samples.T).T).sum(1)
    occupied = ((samples @ directions.T) @ gram.inverse() * (samples @ directions.T)).sum(1)
    assert float(1 - occupied.sum() / own.sum()) == pytest.approx(1 - 3 / D, abs=5e-3)


def test_equal_keys_occupy_capacity_once() -> None:
    """Two equal keys occupy about as much capacity as one."""
    c, active_keys = moment(), keys(2)
    twice = [association_at(k, c, str(i)) for i, k in enumerate([*active_keys, *active_keys])]
    assert average_capacities(twice)[0] == pytest.approx(1 - 2 / D, abs=1e-3)
    assert average_capacities([*twice, association_at(active_keys[0], c, "x", "alphaedit")])[
        0
    ] == pytest.approx(1 - 2 / D, abs=1e-3)
    assert average_capacities([]) == {}


@pytest.mark.parametrize("n", [5, 300])
def test_average_capacity_in_steps_equals_one_computation(n: int) -> None:
    """Solving in blocks of columns gives the same capacity as solving for all columns at once."""
    known = torch.randn(n, 400, generator=torch.Generator().manual_seed(2)).double()
    gram = known @ known.T
    raised = gram + 1e-3 * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    with single_threaded():
        occupied = float(torch.linalg.solve(raised, gram).trace()) / 400
    assert average_capacity(gram, 400) == min(1.0, max(0.0, 1 - occupied))


def test_degenerate_keys_have_a_capacity() -> None:
    """A key without a direction occupies nothing and has capacity 1; keys that are all 0 occupy nothing either."""
    c, key = moment(), keys(1)[0]
    zero = association_at(torch.zeros(D).double(), c, "zero")
    assert capacities_of([zero], [association_at(key, c, "a")]) == {0: 1.0}
    assert capacities_of(
        [association_at(key, c, "a")], [zero, association_at(torch.zeros(D).double(), c, "b")]
    ) == {0: 1.0}
    assert average_capacities([zero]) == {0: 1.0}
