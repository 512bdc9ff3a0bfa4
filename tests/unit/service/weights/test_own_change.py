"""The change that one edit adds to other edits: service.weights.own_change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from service.kit.steps import run_to_completion
from service.models.loading import WeightRef
from service.weights.composition import compose
from service.weights.factors import Association, DenseUpdate, EditUpdate, SolveMode
from service.weights.own_change import OwnChanges

D, d = 12, 5
SPREAD = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
C = SPREAD @ SPREAD.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
MODES = [SolveMode(), SolveMode("joint", 0.1), SolveMode("memit", 3.0), SolveMode("emmet", 0.1)]


def association(i: int, subject: str, mode: SolveMode, layer: int = 0) -> Association:
    """Return a random association whose key has k^T C^-1 k = 1, so that the ridge does not depend on the set of
    edits."""
    g = torch.Generator().manual_seed(i)
    key = torch.randn(D, generator=g)
    direction = torch.linalg.solve(C, key.double())
    scale = float((key.double() @ direction) ** 0.5)
    return Association(
        f"edit_{i:03}",
        subject,
        layer,
        (key / scale).float(),
        (direction / scale).float(),
        torch.randn(d, generator=g),
        mode,
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("others", [0, 1, 6])
def test_change_is_the_difference_of_two_compositions(mode: SolveMode, others: int) -> None:
    """The change equals the composition with the edit minus the composition without it, also for edits of one
    subject."""
    if mode.rule.exact_alone and others == 1:
        pytest.skip("a lone association is solved without the ridge of two")
    active = [association(i, f"s{i % 4}", mode) for i in range(others)]
    new = [association(90 + i, f"s{i}", mode) for i in range(3)]
    changes = run_to_completion(OwnChanges.build([[a] for a in new], active))
    before = compose(active)[WeightRef(0)].dense() if active else torch.zeros(d, D, dtype=torch.float64)
    for a in new:
        expected = compose([*active, a])[WeightRef(0)].dense() - before
        torch.testing.assert_close(changes.change([a]).dense(), expected, rtol=1e-5, atol=1e-6)
        assert changes.norm([a]) == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("others", [0, 5])
def test_change_of_several_associations_is_the_difference_of_two_compositions(
    mode: SolveMode, others: int
) -> None:
    """So is that of an edit with several associations at a layer, in any order, beside edits with several."""
    active = [
        replace(association(10 * i + n, f"s{i % 3}", mode), edit=f"edit_{i}", number=n)
        for i in range(others)
        for n in range(1 + i % 2)
    ]
    new = [replace(association(90 + n, "s1", mode), edit="edit_9", number=n) for n in range(3)]
    changes = run_to_completion(OwnChanges.build([new], active))
    before = compose(active)[WeightRef(0)].dense() if active else torch.zeros(d, D, dtype=torch.float64)
    expected = compose([*active, *new])[WeightRef(0)].dense() - before
    torch.testing.assert_close(changes.change(new[::-1]).dense(), expected, rtol=1e-4, atol=1e-5)
    assert changes.norm(new) == pytest.approx(float(expected.norm()), rel=1e-4)


def test_where_nothing_is_solved_the_change_is_the_products() -> None:
    """An edit of neurons adds the sum of its products, whatever is beside it."""
    mode = SolveMode("kn")
    active = [association(i, "s", mode) for i in range(3)]
    new = [replace(association(90 + n, "s", mode), edit="edit_9", number=n) for n in range(2)]
    changes = run_to_completion(OwnChanges.build([new], active))
    expected = sum(torch.outer(a.value.double(), a.direction.double()) for a in new)
    torch.testing.assert_close(changes.change(new).dense(), expected)
    assert changes.norm(new) == pytest.approx(float(torch.as_tensor(expected).norm()))


def test_change_scales_with_the_strength() -> None:
    """One preparation serves all strengths of an edit."""
    active = [association(i, f"s{i}", MODES[0]) for i in range(4)]
    new = association(90, "s1", MODES[0])
    changes = run_to_completion(OwnChanges.build([[new]], active))
    scaled = new.scaled(0.5)
    expected = compose([*active, scaled])[WeightRef(0)].dense() - compose(active)[WeightRef(0)].dense()
    torch.testing.assert_close(changes.change([scaled]).dense(), expected, rtol=1e-5, atol=1e-6)


def test_layers_modes_and_dense_updates_are_separate() -> None:
    """An edit is compared with the edits of its layer and mode only; a dense update is its own change."""
    active: list[EditUpdate] = [
        association(1, "a", MODES[0]),
        association(2, "b", MODES[0], layer=1),
        association(3, "c", MODES[2]),
    ]
    new = association(90, "d", MODES[0])
    dense = DenseUpdate("edit_091", "e", WeightRef(0), torch.randn(d, D))
    changes = run_to_completion(OwnChanges.build([[new], [dense]], active))
    expected = compose([*active, new])[WeightRef(0)].dense() - compose(active)[WeightRef(0)].dense()
    torch.testing.assert_close(changes.change([new]).dense(), expected, rtol=1e-5, atol=1e-6)
    assert changes.norm([dense]) == pytest.approx(float(dense.change.norm()), rel=1e-6)


@pytest.mark.parametrize("mode", [SolveMode("memit", 0.0), SolveMode("joint", 0.0)], ids=str)
def test_singular_others_do_not_prevent_an_edit(mode: SolveMode) -> None:
    """Next to active edits with equal keys, and next to one without a direction, the change of an edit is finite."""
    first, new = association(1, "a", mode), association(90, "b", mode)
    empty = replace(association(2, "b", mode), key=torch.zeros(D), direction=torch.zeros(D))
    active = [first, replace(first, edit="edit_003", subject="c"), empty]
    changes = run_to_completion(OwnChanges.build([[new]], active))
    expected = compose([*active, new])[WeightRef(0)].dense() - compose(active)[WeightRef(0)].dense()
    torch.testing.assert_close(changes.change([new]).dense(), expected, rtol=1e-5, atol=1e-6)


def test_edit_without_a_direction_has_no_finite_norm() -> None:
    """A new edit whose direction is 0 cannot change its key: its norm is not finite, and the guard rejects it."""
    new = replace(association(90, "b", MODES[0]), direction=torch.zeros(D))
    for active in ([], [association(1, "a", MODES[0])]):
        changes = run_to_completion(OwnChanges.build([[new]], active))
        assert not math.isfinite(changes.norm([new]))
