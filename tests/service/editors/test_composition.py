"""The closed form of a version's weights: service.editors.composition."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.editors.composition import (
    RIDGE,
    Association,
    compose,
    compose_layer,
    norm_ratio,
    pack,
    rebuild,
    unpack,
)

D, d = 12, 5
SPREAD = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
C = SPREAD @ SPREAD.T / D + 0.1 * torch.eye(D, dtype=torch.float64)


def association(
    i: int, subject: str | None = None, layer: int = 0, key: torch.Tensor | None = None
) -> Association:
    g = torch.Generator().manual_seed(i)
    k = torch.randn(D, generator=g) if key is None else key
    direction = torch.linalg.solve(C, k.double()).float()
    return Association(f"edit_{i:03}", subject or f"s{i}", layer, k, direction, torch.randn(d, generator=g))


def oracle(associations: list[Association], ridge: float = RIDGE) -> torch.Tensor:
    """The formula of the design, entry by entry, with its inverse written out."""
    a = sorted(associations, key=lambda x: x.edit)
    n = len(a)
    gram = torch.tensor(
        [[float(x.key.double() @ y.direction.double()) for y in a] for x in a], dtype=torch.float64
    )
    gram = (gram + gram.T) / 2
    eps = ridge * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    wanted = torch.zeros(d, n, dtype=torch.float64)
    for j in range(n):
        for i in range(n):
            if a[i].subject == a[j].subject:
                wanted[:, j] += a[i].value.double() * (gram + eps)[i, j] / gram[i, i]
    directions = torch.stack([x.direction.double() for x in a])
    return wanted @ torch.linalg.inv(gram + eps) @ directions


def test_one_association_is_the_rank_one_update() -> None:
    """A single edit changes the weight by exactly ROME's rank-one update with the symmetric key."""
    a = association(1)
    expected = torch.outer(a.value.double(), a.direction.double()) / (a.key.double() @ a.direction.double())
    torch.testing.assert_close(compose_layer([a]).dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.rank_one().dense(), expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(expected) == 1


def test_the_update_maps_its_key_to_its_value() -> None:
    """The edited weight gives exactly the wanted change at the key: (W + dW) k = W k + delta."""
    a = association(2)
    torch.testing.assert_close(
        compose_layer([a]).dense() @ a.key.double(), a.value.double(), rtol=1e-6, atol=1e-6
    )


def test_the_update_is_the_smallest_in_the_covariance_norm() -> None:
    """Among all changes with dW k = delta, the rank-one update has the least tr(dW C dW^T)."""
    a = association(3)
    best = compose_layer([a]).dense()
    k = a.key.double()
    for seed in range(20):
        other = torch.randn(d, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        nullspace = other - torch.outer(other @ k, k) / (k @ k)
        worse = best + 0.1 * nullspace
        assert torch.trace(worse @ C @ worse.T) > torch.trace(best @ C @ best.T)


def test_a_c_orthogonal_key_is_not_touched() -> None:
    """A key k' with k'^T C^-1 k = 0 gets no change at all."""
    a = association(4)
    other = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(77))
    u = a.direction.double()
    other -= u * (other @ u) / (u @ u)
    assert (compose_layer([a]).dense() @ other).abs().max() < 1e-10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 1000))
def test_the_joint_form_equals_its_definition(subjects: list[int], seed: int) -> None:
    """For any set of edits over any subjects, the solved form equals the formula written out entry by entry."""
    chosen = [association(seed * 10 + i, f"s{s}") for i, s in enumerate(subjects)]
    expected = oracle(chosen)
    torch.testing.assert_close(
        compose_layer(chosen).dense(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_order_never_matters(n: int, seed: int) -> None:
    """The edited weight has the same bytes in whatever order the edits are given."""
    chosen = [association(i, f"s{i // 2}") for i in range(n)]
    shuffled = random.Random(seed).sample(chosen, n)
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5))
    one = rebuild(base, compose_layer(chosen), conv1d=False)
    assert torch.equal(one, rebuild(base, compose_layer(shuffled), conv1d=False))


def test_edits_of_one_subject_add_up() -> None:
    """Edits of one subject superpose: their joint change is the plain sum of their rank-one updates."""
    key = torch.randn(D, generator=torch.Generator().manual_seed(1))
    near = [
        association(i, "s", key=key + 0.01 * torch.randn(D, generator=torch.Generator().manual_seed(i)))
        for i in (5, 6, 7)
    ]
    total = sum(a.rank_one().dense() for a in near)
    torch.testing.assert_close(compose_layer(near).dense(), total, rtol=1e-6, atol=1e-6)


def test_edits_of_different_subjects_are_isolated() -> None:
    """With edits of different subjects, each key gets its own change and none of the others' (up to the ridge)."""
    chosen = [association(i) for i in range(20, 25)]
    change = compose_layer(chosen, ridge=1e-12).dense()
    for a in chosen:
        torch.testing.assert_close(change @ a.key.double(), a.value.double(), rtol=1e-4, atol=1e-4)


def test_reverting_is_forgetting() -> None:
    """The weight without an edit is the weight of the others alone, as if it had never been made."""
    chosen = [association(i, f"s{i % 3}") for i in range(6)]
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5))
    without = [a for a in chosen if a.edit != "edit_003"]
    again = rebuild(base, compose_layer([a for a in reversed(chosen) if a.edit != "edit_003"]), conv1d=False)
    assert torch.equal(rebuild(base, compose_layer(without), conv1d=False), again)
    assert compose([]) == {}


def test_layers_are_solved_apart() -> None:
    """Associations of different layers do not see one another."""
    a, b = association(1, layer=1), association(2, layer=3)
    both = compose([b, a])
    assert list(both) == [1, 3]
    torch.testing.assert_close(both[1].dense(), compose_layer([a]).dense(), rtol=0, atol=0)


@pytest.mark.parametrize("conv1d", [True, False])
def test_orientation_follows_the_architecture(conv1d: bool) -> None:
    """A square weight is changed in the right orientation: Conv1D is stored transposed, and shapes cannot tell."""
    g = torch.Generator().manual_seed(3)
    key, value = torch.randn(d, generator=g), torch.randn(d, generator=g)
    a = Association("e", "s", 0, key, key.clone(), value)
    base = torch.randn(d, d, generator=g)
    edited = rebuild(base, compose_layer([a]), conv1d)
    change = (edited - base).T if conv1d else edited - base
    torch.testing.assert_close(change @ key, value, rtol=1e-4, atol=1e-4)


def test_the_edited_weight_is_cast_once() -> None:
    """A half-precision weight is rebuilt in fp64 and rounded once, so its bytes do not depend on the number of edits before."""
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5)).bfloat16()
    change = compose_layer([association(1), association(2)])
    expected = (base.double() + change.dense()).bfloat16()
    assert torch.equal(rebuild(base, change, conv1d=False), expected)


def test_packed_associations_come_back() -> None:
    """Packing to safetensors and back keeps every bit that composition uses."""
    chosen = [association(1, "s", layer=0), association(1, "s", layer=2)]
    back = unpack(pack(chosen), "edit_001", "s")
    for a, b in zip(chosen, back, strict=True):
        assert (a.edit, a.subject, a.layer) == (b.edit, b.subject, b.layer)
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("key", "direction", "value"))


def test_norm_ratio() -> None:
    """The ratio is |dW| / |W| in Frobenius norm."""
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5))
    change = compose_layer([association(1)])
    assert norm_ratio(base, change) == pytest.approx(float(change.dense().norm() / base.norm()), rel=1e-5)
