"""Gated associations at keys: service.gating.gated_rows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.gating.gated_rows import GatedRows, build_gated_rows
from service.weights.composition import compose_layer
from service.weights.factors import Association, Gate, deserialize_updates, serialize_updates
from service.weights.gate_space import build_gate_space

D, d, LAYER = 24, 6, 2
SPREAD = torch.randn(D, 4 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
STATISTICS = KeyStatistics(LAYER, SPREAD @ SPREAD.T / (4 * D), 1000, 1e-2, "digest")
SPACE = build_gate_space(STATISTICS, size=64)


def gated(
    i: int,
    subject: str | None = None,
    threshold: float = 0.9,
    key: Tensor | None = None,
    others: int = 2,
    blocked: Tensor | None = None,
) -> Association:
    """An association with keys around its own."""
    g = torch.Generator().manual_seed(i)
    key = torch.randn(D, generator=g) if key is None else key
    keys = torch.stack([key, *(key + 0.05 * torch.randn(D, generator=g) for _ in range(others))])
    blocked = torch.empty(0, D) if blocked is None else blocked
    gate = Gate(SPACE, SPACE.project(keys), SPACE.project(blocked), threshold)
    direction = STATISTICS.solve(key).float()
    value = torch.randn(d, generator=g)
    return Association(f"edit_{i:03}", subject or f"s{i}", LAYER, key, direction, value, gate=gate)


def some_keys(count: int, seed: int = 100_000) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def scores_of(associations: list[Association], key: Tensor) -> dict[str, float]:
    """The score of each association at a key, in fp64."""
    q = torch.nn.functional.normalize(SPACE.sketch.double() @ key.double(), dim=0)
    scores = {}
    for a in associations:
        assert a.gate is not None
        limit = max([a.gate.threshold, *(float(q @ b.double()) for b in a.gate.blocked)])
        scores[a.edit] = max(float(q @ own.double()) for own in a.gate.keys) - limit
    return scores


def oracle(associations: list[Association], key: Tensor) -> Tensor:
    """The definition, one association and one key at a time, in fp64."""
    scores = scores_of(associations, key)
    nearest = max(sorted(scores), key=lambda edit: scores[edit])
    change = torch.zeros(d, dtype=torch.float64)
    if scores[nearest] <= 0:
        return change
    subject = next(a.subject for a in associations if a.edit == nearest)
    for a in associations:
        if a.subject == subject and scores[a.edit] > 0:
            product = a.direction.double() @ key.double()
            ratio = float(product / (a.direction.double() @ a.key.double()))
            change += min(1.0, max(0.0, ratio)) * a.value.double()
    return change


def dense_change(rows: GatedRows, keys: Tensor, **options: bool) -> Tensor:
    change = rows.change(keys, **options)
    return torch.zeros(len(keys), d) if change is None else change


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(-1, 1))
def test_the_change_is_the_definition(seed: int, count: int, threshold: float) -> None:
    """The batched change equals the definition at each key, for any thresholds and shared subjects."""
    rng = random.Random(seed)
    associations = [
        gated(
            seed + i,
            f"s{rng.randrange(count)}",
            threshold,
            others=rng.randrange(4),
            blocked=some_keys(rng.randrange(4), seed - i - 1),
        )
        for i in range(count)
    ]
    keys = torch.cat([some_keys(5, seed), *(a.key[None] * rng.uniform(0.2, 3) for a in associations)])
    assume(all(abs(s) > 1e-5 for k in keys for s in scores_of(associations, k).values()))
    change = dense_change(build_gated_rows(associations), keys)
    expected = torch.stack([oracle(associations, k) for k in keys])
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_blocked_key_opens_nothing() -> None:
    """At the key of another subject that comes near the association stays closed, and open at its own key."""
    own = gated(1, threshold=0.5)
    other = own.key + 0.3 * some_keys(1)[0]
    rows = build_gated_rows([own])
    assert rows.change(other[None]) is not None
    rows = build_gated_rows([gated(1, threshold=0.5, blocked=other[None])])
    assert rows.change(other[None]) is None
    torch.testing.assert_close(dense_change(rows, own.key[None]), own.value[None])


def test_nothing_open_is_no_change() -> None:
    """Keys below every threshold leave the output to the base."""
    rows = build_gated_rows([gated(i) for i in range(5)])
    assert rows.change(some_keys(50)) is None


def test_one_association_forced_open_is_the_rank_one_update() -> None:
    """Open everywhere and not limited, an association is ROME's rank-one update at every key."""
    a = gated(3)
    change = dense_change(build_gated_rows([a]), some_keys(20), limited=False, forced=True)
    expected = some_keys(20).double() @ a.rank_one().dense().T
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-4)


def test_one_subject_forced_open_is_the_joint_form() -> None:
    """The associations of one subject, open everywhere and not limited, are what `compose_layer` solves."""
    associations = [gated(i, "one") for i in range(4)]
    change = dense_change(build_gated_rows(associations), some_keys(20), limited=False, forced=True)
    solved = compose_layer([replace(a, gate=None) for a in associations]).dense()
    torch.testing.assert_close(change.double(), some_keys(20).double() @ solved.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 10, 300])
def test_distinct_subjects_get_exactly_their_change_at_their_key(count: int) -> None:
    """However many associations are active, the change at a key is its own delta: there is no capacity to fill."""
    associations = [gated(i) for i in range(count)]
    change = dense_change(build_gated_rows(associations), torch.stack([a.key for a in associations]))
    torch.testing.assert_close(change, torch.stack([a.value for a in associations]), rtol=1e-5, atol=1e-5)


def test_the_rows_are_a_function_of_the_set() -> None:
    """Order does not matter, and without an association the rows are those that never had it."""
    associations = [gated(i) for i in range(8)]
    rows = build_gated_rows(associations)
    shuffled = build_gated_rows(random.Random(1).sample(associations, 8))
    assert all(torch.equal(t, shuffled.tensors()[name]) for name, t in rows.tensors().items())
    keys = torch.cat([some_keys(9), torch.stack([a.key for a in associations])])
    reverted = build_gated_rows(associations[1:])
    assert torch.equal(dense_change(reverted, keys[1:9]), dense_change(rows, keys[1:9]))
    assert reverted.change(keys[9:10]) is None


def test_a_key_decides_alone() -> None:
    """The change at a key does not depend on the keys that are beside it in a batch."""
    associations = [gated(i) for i in range(20)]
    rows = build_gated_rows(associations)
    keys = torch.cat([some_keys(30), torch.stack([a.key for a in associations])])
    together = dense_change(rows, keys)
    alone = torch.cat([dense_change(rows, k[None]) for k in keys])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threshold", [1.0, -1.01])
def test_thresholds_at_the_ends(threshold: float) -> None:
    """A threshold of 1 opens nowhere, and one below -1 everywhere."""
    rows = build_gated_rows([gated(1, threshold=threshold)])
    change = rows.change(some_keys(10))
    if threshold == 1.0:
        assert change is None
    else:
        assert change is not None
        assert rows.scores(some_keys(10)).min() > 0


def test_a_gate_is_stored_with_its_association() -> None:
    """Serialized factors keep the gate, bit for bit."""
    a = gated(5, blocked=some_keys(3))
    (read,) = deserialize_updates(
        serialize_updates([a]), a.edit, a.subject, {SPACE.digest: SPACE}.__getitem__
    )
    assert isinstance(read, Association)
    assert a.gate is not None
    assert read.gate is not None
    assert read.gate.space is SPACE
    assert read.gate.threshold == pytest.approx(a.gate.threshold)
    assert torch.equal(read.gate.keys, a.gate.keys)
    assert torch.equal(read.gate.blocked, a.gate.blocked)


def test_associations_of_two_spaces_are_refused() -> None:
    """Keys of different sketches cannot be compared."""
    other = build_gate_space(STATISTICS, size=64, seed=1)
    first, second = gated(1), gated(2)
    assert second.gate is not None
    with pytest.raises(ValueError, match="in one space"):
        build_gated_rows([first, replace(second, gate=replace(second.gate, space=other))])
    with pytest.raises(ValueError, match="in one space"):
        build_gated_rows([first, replace(second, gate=None)])
