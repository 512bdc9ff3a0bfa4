"""The closed form of a version's weights: service.weights.composition."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.models.loading import WeightRef
from service.models.memory_estimates import COLUMN_BLOCK
from service.weights import solve as solve_module
from service.weights.composition import (
    apply_delta,
    compose,
    compose_layer,
    compose_layer_in_steps,
    is_change_in_range,
    is_in_range,
)
from service.weights.factors import (
    JOINT,
    Association,
    DenseUpdate,
    EditUpdate,
    LowRank,
    SolveMode,
    deserialize_updates,
    serialize_updates,
)
from service.weights.solve import single_threaded
from tests.support.hostile_factors import random_updates

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


def composition_oracle(associations: list[Association], ridge: float = JOINT.ridge) -> torch.Tensor:
    """The formula of the joint mode, entry by entry, with an explicit inverse."""
    a = sorted(associations, key=lambda x: x.edit)
    n = len(a)
    gram = torch.tensor(
        [[float(x.key.double() @ y.direction.double()) for y in a] for x in a], dtype=torch.float64
    )
    eps = ridge * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    wanted = torch.zeros(d, n, dtype=torch.float64)
    for j in range(n):
        for i in range(n):
            if a[i].subject == a[j].subject:
                wanted[:, j] += a[i].value.double() * (gram + eps)[j, i] / gram[i, i]
    directions = torch.stack([x.direction.double() for x in a])
    change: torch.Tensor = wanted @ torch.linalg.inv((gram + eps).T) @ directions
    return change


def test_one_association_is_the_rank_one_update() -> None:
    """A single edit changes the weight by exactly ROME's rank-one update with the symmetric key."""
    a = association(1)
    expected = torch.outer(a.value.double(), a.direction.double()) / (a.key.double() @ a.direction.double())
    torch.testing.assert_close(compose_layer([a]).dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.rank_one().dense(), expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(expected) == 1


def test_unsolved_products_are_added_and_equal_ones_count_once() -> None:
    """Where nothing is solved the change is the sum of the products of values and directions in any order. Of equal
    products of two edits one counts, and each alone has it."""
    mode = SolveMode("kn")
    a, b = (replace(association(i), solve_mode=mode) for i in (1, 2))
    again = replace(a, edit="edit_009", subject="other")
    expected = sum(torch.outer(x.value.double(), x.direction.double()) for x in (a, b))
    for group in ([a, b], [b, again, a], [again, b]):
        torch.testing.assert_close(compose_layer(group).dense(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.rank_one().dense(), compose_layer([a]).dense(), rtol=0, atol=0)


def test_the_update_maps_its_key_to_its_value() -> None:
    """The edited weight maps the key to the changed value: (W + dW) k = W k + delta."""
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
    """A key k' with k'^T C^-1 k = 0 is not changed."""
    a = association(4)
    other = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(77))
    u = a.direction.double()
    other -= u * (other @ u) / (u @ u)
    assert (compose_layer([a]).dense() @ other).abs().max() < 1e-10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 1000))
def test_the_joint_form_equals_its_definition(subjects: list[int], seed: int) -> None:
    """For any edits of any subjects, the joint composition equals the formula written out entry by entry."""
    chosen = [association(seed * 10 + i, f"s{s}") for i, s in enumerate(subjects)]
    expected = composition_oracle(chosen)
    torch.testing.assert_close(
        compose_layer(chosen).dense(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_order_never_matters(n: int, seed: int) -> None:
    """The edited weight has the same bytes for any order of the edits."""
    chosen = [association(i, f"s{i // 2}") for i in range(n)]
    shuffled = random.Random(seed).sample(chosen, n)
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5))
    one = apply_delta(base, compose_layer(chosen), conv1d=False)
    assert torch.equal(one, apply_delta(base, compose_layer(shuffled), conv1d=False))


def test_edits_of_one_subject_add_up() -> None:
    """The joint change of edits of one subject is the sum of their rank-one updates."""
    key = torch.randn(D, generator=torch.Generator().manual_seed(1))
    near = [
        association(i, "s", key=key + 0.01 * torch.randn(D, generator=torch.Generator().manual_seed(i)))
        for i in (5, 6, 7)
    ]
    total = sum(a.rank_one().dense() for a in near)
    torch.testing.assert_close(compose_layer(near).dense(), total, rtol=1e-6, atol=1e-6)


def test_edits_of_different_subjects_are_isolated() -> None:
    """With edits of different subjects each key gets its own change and none of the others', up to the
    ridge."""
    chosen = [association(i) for i in range(20, 25)]
    change = compose_layer(chosen, SolveMode(ridge=1e-12)).dense()
    for a in chosen:
        torch.testing.assert_close(change @ a.key.double(), a.value.double(), rtol=1e-4, atol=1e-4)


def test_isolation_outlives_the_statistics() -> None:
    """Edits are isolated from each other also if their directions were computed with different statistics."""
    chosen = [association(i) for i in range(20, 25)]
    chosen[1:3] = [replace(a, direction=a.key * torch.linspace(1, 2, D)) for a in chosen[1:3]]
    change = compose_layer(chosen, SolveMode(ridge=1e-12)).dense()
    for a in chosen:
        torch.testing.assert_close(change @ a.key.double(), a.value.double(), rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_no_byte() -> None:
    """The number of threads does not change the bits of the solution."""
    keys = torch.randn(1000, D, generator=torch.Generator().manual_seed(3))
    chosen = [association(i, key=key) for i, key in enumerate(keys)]
    threads, solutions = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            solutions.append(compose_layer(chosen))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(solutions[0].left, solutions[1].left)


@pytest.mark.parametrize("conv1d", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wide_weight_is_rebuilt_column_by_column(conv1d: bool, dtype: torch.dtype) -> None:
    """A change applied in blocks of columns is the same product, in the layout of the weight; the base is
    unchanged."""
    g = torch.Generator().manual_seed(8)
    width = 2 * COLUMN_BLOCK + 3
    change = LowRank(torch.randn(d, 4, dtype=torch.float64, generator=g), torch.randn(4, width, generator=g))
    base = torch.randn(*((width, d) if conv1d else (d, width)), dtype=torch.float64, generator=g).to(dtype)
    before = base.clone()
    whole = change.left @ change.right.double()
    torch.testing.assert_close(change.dense(), whole, rtol=1e-12, atol=1e-12)
    edited = apply_delta(base, change, conv1d)
    expected = (base.double() + (whole.T if conv1d else whole)).to(dtype)
    torch.testing.assert_close(edited, expected, rtol=torch.finfo(dtype).eps, atol=1e-12)
    assert edited.is_contiguous()
    assert torch.equal(base, before)


def test_composing_keeps_keys_as_they_are_stored() -> None:
    """The left factor of a composed change is fp64, and the right factor, with the length of a key, stays
    fp32."""
    change = compose_layer([association(1), association(2)])
    assert (change.left.dtype, change.right.dtype) == (torch.float64, torch.float32)


def test_reverting_equals_never_having_edited() -> None:
    """The weight after a revert equals the weight composed from the other edits only."""
    chosen = [association(i, f"s{i % 3}") for i in range(6)]
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5))
    without = [a for a in chosen if a.edit != "edit_003"]
    again = apply_delta(
        base, compose_layer([a for a in reversed(chosen) if a.edit != "edit_003"]), conv1d=False
    )
    assert torch.equal(apply_delta(base, compose_layer(without), conv1d=False), again)
    assert compose([]) == {}


def test_layers_are_solved_apart() -> None:
    """Associations of different layers are composed independently."""
    a, b = association(1, layer=1), association(2, layer=3)
    both = compose([b, a])
    assert list(both) == [WeightRef(1), WeightRef(3)]
    torch.testing.assert_close(both[WeightRef(1)].dense(), compose_layer([a]).dense(), rtol=0, atol=0)


@pytest.mark.parametrize("conv1d", [True, False])
def test_orientation_follows_the_architecture(conv1d: bool) -> None:
    """A square weight is changed in the right orientation, which its shape does not determine."""
    g = torch.Generator().manual_seed(3)
    key, value = torch.randn(d, generator=g), torch.randn(d, generator=g)
    a = Association("e", "s", 0, key, key.clone(), value)
    base = torch.randn(d, d, generator=g)
    edited = apply_delta(base, compose_layer([a]), conv1d)
    change = (edited - base).T if conv1d else edited - base
    torch.testing.assert_close(change @ key, value, rtol=1e-4, atol=1e-4)


def test_the_edited_weight_is_cast_once() -> None:
    """A half-precision weight is computed in fp64 and rounded once."""
    base = torch.randn(d, D, generator=torch.Generator().manual_seed(5)).bfloat16()
    change = compose_layer([association(1), association(2)])
    expected = (base.double() + change.dense()).bfloat16()
    assert torch.equal(apply_delta(base, change, conv1d=False), expected)


def test_serialized_associations_round_trip() -> None:
    """Serialization to safetensors and back keeps every bit that composition uses."""
    chosen = [association(1, "s", layer=0), association(1, "s", layer=2)]
    back = deserialize_updates(serialize_updates(chosen), "edit_001", "s")
    for a, b in zip(chosen, back, strict=True):
        assert (a.edit, a.subject, a.layer) == (b.edit, b.subject, b.layer)
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("key", "direction", "value"))


@pytest.mark.parametrize("terms", [1, 2, 3, 9])
def test_norm(terms: int) -> None:
    """The norm is the Frobenius norm, for fewer terms than the weight has rows and for more."""
    change = compose_layer([association(i) for i in range(terms)])
    assert change.norm() == pytest.approx(float(change.dense().norm()), rel=1e-10)


def association_with_mode(i: int, solve_mode: SolveMode) -> Association:
    return replace(association(i), solve_mode=solve_mode)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 1000))
def test_memit_is_its_normal_equations(n: int, ridge: float, seed: int) -> None:
    """The MEMIT mode is Delta K^T (lambda C + K K^T)^-1, the solution in its paper (Eq. 14)."""
    associations = [association_with_mode(seed * 10 + i, SolveMode("memit", ridge)) for i in range(n)]
    ordered = sorted(associations, key=lambda a: a.edit)
    keys = torch.stack([a.key.double() for a in ordered], 1)
    values = torch.stack([a.value.double() for a in ordered], 1)
    expected = values @ keys.T @ torch.linalg.inv(ridge * C + keys @ keys.T)
    torch.testing.assert_close(
        compose_layer(associations).dense(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


def test_emmet_is_memit_without_its_ridge() -> None:
    """EMMET with a ridge near 0 writes every value exactly and equals MEMIT with a ridge near 0. A single
    EMMET edit is its rank-one update."""
    associations = [association_with_mode(i, SolveMode("emmet", 1e-9)) for i in range(4)]
    change = compose_layer(associations).dense()
    for a in associations:
        torch.testing.assert_close(change @ a.key.double(), a.value.double(), rtol=1e-4, atol=1e-4)
    limit = compose_layer([replace(a, solve_mode=SolveMode("memit", 1e-9)) for a in associations]).dense()
    torch.testing.assert_close(change, limit, rtol=1e-6, atol=1e-8)
    alone = association_with_mode(3, SolveMode("emmet", 5.0))
    torch.testing.assert_close(compose_layer([alone]).dense(), association(3).rank_one().dense())


def test_a_great_ridge_writes_nothing() -> None:
    """MEMIT with a very large ridge leaves the weight unchanged."""
    associations = [association_with_mode(i, SolveMode("memit", 1e12)) for i in range(3)]
    assert compose_layer(associations).norm() < 1e-8


@pytest.mark.parametrize(
    "form", [JOINT, SolveMode("memit", 3.0), SolveMode("emmet", 0.5), SolveMode("alphaedit", 2.0)]
)
def test_alone_an_association_is_its_rank_one_change(form: SolveMode) -> None:
    """A single association is composed to its rank-one update in every mode."""
    a = association_with_mode(6, form)
    torch.testing.assert_close(compose_layer([a]).dense(), a.rank_one().dense(), rtol=1e-12, atol=1e-14)


def test_solve_modes_and_dense_updates_add_up() -> None:
    """The change of a weight is the sum of the solutions of the modes and of the dense updates, in any
    order."""
    g = torch.Generator().manual_seed(1)
    updates: list[EditUpdate] = [
        association(1),
        association_with_mode(2, SolveMode("memit", 3.0)),
        association(3),
    ]
    updates += [DenseUpdate(f"edit_{i}", "s", WeightRef(0), torch.randn(d, D, generator=g)) for i in (7, 8)]
    expected = compose_layer([association(1), association(3)]).dense()
    expected = expected + compose_layer([association_with_mode(2, SolveMode("memit", 3.0))]).dense()
    expected = expected + sum(p.change.double() for p in updates if isinstance(p, DenseUpdate))
    change = compose(updates)[WeightRef(0)]
    torch.testing.assert_close(change.dense(), expected, rtol=1e-12, atol=1e-12)
    base = torch.randn(d, D, generator=g)
    again = apply_delta(
        base, compose(random.Random(3).sample(updates, len(updates)))[WeightRef(0)], conv1d=False
    )
    assert torch.equal(apply_delta(base, change, conv1d=False), again)


def test_every_kind_of_update_round_trips() -> None:
    """Solve modes, ridges and dense updates are unchanged by serialization."""
    change = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    updates: list[EditUpdate] = [
        association_with_mode(1, SolveMode("memit", 0.1)),
        DenseUpdate("edit_001", "s1", WeightRef(2, "qkv"), change),
    ]
    back = deserialize_updates(serialize_updates(updates), "edit_001", "s1")
    assert isinstance(back[0], Association) and back[0].solve_mode == SolveMode("memit", 0.1)
    assert isinstance(back[1], DenseUpdate) and back[1].weight_ref == WeightRef(2, "qkv")
    assert torch.equal(back[1].change, change)


# steps


def long_association(i: int, subject: str, width: int = 700, out: int = 96) -> Association:
    g = torch.Generator().manual_seed(1000 + i)
    key = torch.randn(width, generator=g)
    direction = key * 0.5 + 0.05 * torch.randn(width, generator=g)
    return Association(f"edit_{i:05}", subject, 0, key, direction, torch.randn(out, generator=g))


def compose_at_once(associations: list[Association]) -> LowRank:
    """The composition as one computation, without steps: the oracle for its bytes."""
    ordered = sorted(associations, key=lambda a: a.edit)
    directions = torch.stack([a.direction for a in ordered])
    values = torch.stack([a.value for a in ordered], 1).double()
    keys = torch.stack([a.key for a in ordered])
    gram = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    for start in range(0, keys.shape[1], COLUMN_BLOCK):
        at = slice(start, start + COLUMN_BLOCK)
        gram.addmm_(keys[:, at].double(), directions[:, at].double().T)
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(JOINT.ridge_for(diagonal))
    targets = values * (gram.diagonal() / diagonal)
    for subject in dict.fromkeys(a.subject for a in ordered):
        rows = [i for i, a in enumerate(ordered) if a.subject == subject]
        if len(rows) > 1:
            targets[:, rows] = values[:, rows] @ (gram[rows][:, rows].T / diagonal[rows, None])
    with single_threaded():
        return LowRank(torch.linalg.solve(gram, targets.T).T, directions)


@pytest.mark.parametrize("n", [3, 256, 513, 769, 1000])
@pytest.mark.parametrize("one_subject", [False, True])
def test_steps_give_the_bytes_of_one_computation(n: int, one_subject: bool) -> None:
    """Composing in steps gives the same bytes as composing at once, whatever the number of edits of a subject."""
    if one_subject and n > 600:
        n = 600
    chosen = [long_association(i, "s" if one_subject else f"s{i // 2}") for i in range(n)]
    expected = compose_at_once(chosen)
    found = compose_layer(chosen)
    assert torch.equal(found.left, expected.left) and torch.equal(found.right, expected.right)
    base = torch.randn(96, 700, generator=torch.Generator().manual_seed(3))
    at_once = torch.empty_like(base)
    for at, block in expected.column_blocks():
        at_once[:, at] = (block + base[:, at].double()).to(base.dtype)
    assert torch.equal(apply_delta(base, found, conv1d=False), at_once)


def test_composition_has_many_steps() -> None:
    """A composition of many edits has a step for each block of rows and columns, so that no step is long."""
    chosen = [long_association(i, f"s{i}") for i in range(1100)]
    assert sum(1 for _ in compose_layer_in_steps(chosen)) >= 20


HOSTILE_NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-38, -3e38, 3e38])


@st.composite
def any_associations(draw: st.DrawFn) -> list[Association]:
    """Draw associations of one layer whose tensors are any finite numbers; some have equal keys and directions."""
    vectors = [
        torch.tensor(draw(st.lists(HOSTILE_NUMBERS, min_size=D, max_size=D)), dtype=torch.float32)
        for _ in range(2)
    ]
    modes = [JOINT, SolveMode("memit", 0.0), SolveMode("emmet", 0.0), SolveMode("alphaedit", 10.0)]
    mode = draw(st.sampled_from(modes))
    return [
        Association(
            f"edit_{i}",
            draw(st.sampled_from(["a", "b"])),
            0,
            draw(st.sampled_from(vectors)),
            draw(st.sampled_from(vectors)),
            vectors[0][:d],
            mode,
        )
        for i in range(draw(st.integers(1, 5)))
    ]


@given(any_associations())
def test_any_finite_associations_have_a_version(associations: list[Association]) -> None:
    """Every set of associations with finite tensors composes to a weight, whatever was imported and reverted."""
    base = torch.zeros(d, D)
    edited = apply_delta(base, compose(associations)[WeightRef(0)], conv1d=False)
    assert edited.shape == base.shape and edited.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("least_norm_size", [0, 256])
def test_every_subset_of_hostile_edits_has_finite_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, least_norm_size: int
) -> None:
    """Any subset of edits with any tensors that an import accepts gives finite weights, whatever its order. So it is
    where a singular system is damped because it is large."""
    monkeypatch.setattr(solve_module, "LEAST_NORM_SIZE", least_norm_size)
    for seed in range(100):
        numbers = random.Random(seed)
        edits = list(random_updates(numbers, d, D, numbers.randint(1, 12)).values())
        for _ in range(2):
            updates = [u for group in numbers.sample(edits, numbers.randint(1, len(edits))) for u in group]
            base = torch.ones(d, D, dtype=dtype)
            edited = apply_delta(base, compose(updates)[WeightRef(0)], conv1d=False)
            assert edited.isfinite().all(), f"seed {seed}"
            numbers.shuffle(updates)
            again = apply_delta(base, compose(updates)[WeightRef(0)], conv1d=False)
            assert torch.equal(again.view(torch.uint8), edited.view(torch.uint8)), f"seed {seed}"


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_sum_beyond_the_range_is_the_largest_number(conv1d: bool) -> None:
    """Updates that are finite each, and whose sum is not, give the largest number of the dtype, and leave the other
    numbers as they are. `is_in_range` finds it."""
    change = torch.zeros(d, D)
    change[0, 0], change[1, 1], change[2, 2] = 1e30, -1e30, 1.0
    updates = [DenseUpdate(f"edit_{i}", "a", WeightRef(0), change) for i in range(3)]
    base = torch.zeros(D, d) if conv1d else torch.zeros(d, D)
    base = base.half()
    edited = apply_delta(base, compose(updates)[WeightRef(0)], conv1d)
    edited = edited.T if conv1d else edited
    largest = torch.finfo(torch.float16).max
    assert edited.diagonal()[:3].tolist() == [largest, -largest, 3.0]
    assert not is_in_range(edited) and is_in_range(edited[2:])


def test_the_change_of_an_edit_alone_is_measured_in_its_dtype() -> None:
    """The change of one update is out of range when its largest number is; a key without a direction has no change."""
    one = replace(association(1), key=torch.eye(D)[0], direction=torch.eye(D)[0], value=torch.full((d,), 1e5))
    assert is_change_in_range(one, torch.float32) and not is_change_in_range(one, torch.float16)
    dense = DenseUpdate("e", "a", WeightRef(0), torch.full((d, D), 1e5))
    assert is_change_in_range(dense, torch.float32) and not is_change_in_range(dense, torch.float16)
    assert not is_change_in_range(replace(one, direction=torch.zeros(D)), torch.float32)


@pytest.mark.parametrize("mode", ["memit", "emmet", "joint"])
def test_equal_keys_share_the_change_of_least_norm(mode: str) -> None:
    """Two subjects with one key and ridge 0 have a singular system; the result is finite and means their values."""
    first = replace(association(1, "a"), solve_mode=SolveMode(mode, 0.0))
    second = replace(first, edit="edit_002", subject="b", value=-first.value)
    change = compose_layer([first, second]).dense()
    torch.testing.assert_close(
        change @ first.key.double(), torch.zeros(d, dtype=torch.float64), atol=1e-9, rtol=0
    )
    same = compose_layer([first, replace(second, value=first.value)]).dense()
    torch.testing.assert_close(same @ first.key.double(), first.value.double(), atol=1e-6, rtol=1e-6)


def test_key_without_a_direction_changes_nothing() -> None:
    """An association whose key and direction are 0 leaves the others' change as it is."""
    one, zero = association(1), torch.zeros(D)
    empty = replace(association(2), key=zero, direction=zero)
    torch.testing.assert_close(
        compose_layer([one, empty]).dense(), compose_layer([one]).dense(), atol=1e-9, rtol=1e-9
    )
