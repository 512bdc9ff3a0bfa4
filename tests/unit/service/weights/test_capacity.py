"""How much of a layer is spoken for: service.weights.capacity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.kit.steps import finish
from service.models.loading import Site
from service.weights.capacity import average_room, average_rooms, room, rooms_steps
from service.weights.composition import Addend, Association, Form, Piece

D, N = 12, 5


def moment(seed: int = 0) -> Tensor:
    mixed = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double()
    return mixed @ mixed.T + 0.1 * torch.eye(D)


def keys(n: int = N, seed: int = 1) -> Tensor:
    """(n, D)."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).double()


def at(key: Tensor, c: Tensor, subject: str, form: str = "joint", layer: int = 0) -> Association:
    return Association(subject, subject, layer, key, torch.linalg.solve(c, key), torch.ones(3), Form(form))


def rooms(mine: list[Piece], others: list[Piece]) -> dict[int, float]:
    (found,) = finish(rooms_steps([mine], others))
    return found


def by_projection(c: Tensor, there: Tensor, key: Tensor) -> float:
    """1 - |projection|^2 / |k|^2 in the metric C^-1: the keys whitened by C = L L^T, then plain least squares."""
    lower = torch.linalg.cholesky(c)
    white = torch.linalg.solve_triangular(lower, torch.stack([*there, key], 1), upper=False)
    basis, target = white[:, :-1], white[:, -1]
    projected = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
    return 1 - float(projected @ projected / (target @ target))


@pytest.mark.parametrize("seed", range(5))
def test_room_is_what_a_projection_leaves(seed: int) -> None:
    """Without a ridge, spoken for is the C^-1-orthogonal projection's share of the key."""
    c, there, key = moment(seed), keys(seed=seed + 10), keys(1, seed + 20)[0]
    directions = torch.linalg.solve(c, there.T).T
    left = room(there @ directions.T, directions @ key, float(key @ torch.linalg.solve(c, key)), ridge=0.0)
    assert left == pytest.approx(by_projection(c, there, key), abs=1e-9)
    found = rooms([at(key, c, "new")], [at(k, c, str(i)) for i, k in enumerate(there)])
    assert found[0] == pytest.approx(left, abs=2e-2) and 0 <= found[0] <= 1


def test_the_ends() -> None:
    """Alone, all of a key is free; a sum of others' keys is spoken for; one that C^-1 sees at right angles is free."""
    c, there = moment(), keys(2)
    others = [at(k, c, str(i)) for i, k in enumerate(there)]
    assert rooms([at(there[0], c, "new")], []) == {0: 1.0}
    assert rooms([at(there[0] - 2 * there[1], c, "new")], others)[0] < 1e-2
    directions = torch.linalg.solve(c, there.T).T
    free = torch.linalg.svd(directions).Vh[-1]
    assert rooms([at(free, c, "new")], others)[0] == pytest.approx(1.0, abs=1e-9)


def test_who_counts() -> None:
    """Edits of the same subject, of other layers and of another metric, and changes of whole weights, leave all of the room."""
    c, key = moment(), keys(1)[0]
    beside = [
        at(key, c, "new"),
        at(key, c, "a", layer=1),
        at(key, c, "b", "alphaedit"),
        Addend("c", "c", Site(0), torch.zeros(3, D)),
    ]
    assert rooms([at(key, c, "new")], beside) == {0: 1.0}
    assert rooms([Addend("c", "c", Site(0), torch.zeros(3, D))], beside) == {}
    assert rooms([at(key, c, "new", "memit")], [*beside, at(key, c, "d")])[0] < 1e-2


def test_of_an_average_key() -> None:
    """Of keys drawn from the statistics, n different keys take n / D on average: the mean over many draws, weighted by length."""
    c, there = moment(), keys(3)
    directions = torch.linalg.solve(c, there.T).T
    gram = there @ directions.T
    assert average_room(gram, D, ridge=0.0) == pytest.approx(1 - 3 / D)
    drawn = keys(20_000, 7) @ torch.linalg.cholesky(c).T
    own = (drawn * torch.linalg.solve(c, drawn.T).T).sum(1)
    spoken = ((drawn @ directions.T) @ gram.inverse() * (drawn @ directions.T)).sum(1)
    assert float(1 - spoken.sum() / own.sum()) == pytest.approx(1 - 3 / D, abs=5e-3)


def test_equal_keys_are_one() -> None:
    """A key that is there twice takes the room of one, nearly."""
    c, there = moment(), keys(2)
    twice = [at(k, c, str(i)) for i, k in enumerate([*there, *there])]
    assert average_rooms(twice)[0] == pytest.approx(1 - 2 / D, abs=1e-3)
    assert average_rooms([*twice, at(there[0], c, "x", "alphaedit")])[0] == pytest.approx(1 - 2 / D, abs=1e-3)
    assert average_rooms([]) == {}
