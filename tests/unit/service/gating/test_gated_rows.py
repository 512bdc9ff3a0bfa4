"""Gated associations at keys: service.gating.gated_rows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.gating import gated_rows
from service.gating.gated_rows import GatedRows, change_of_batch
from service.weights.composition import compose_layer
from service.weights.factors import Association, deserialize_updates, serialize_updates
from tests.support.gated_associations import (
    SPACE,
    D,
    change_by_definition,
    d,
    dense_change,
    gated,
    new_table,
    rows_of,
    scores_of,
    some_keys,
)


def random_associations(seed: int, count: int, threshold: float) -> list[Association]:
    """Return associations that share subjects, with any number of keys and blocked keys."""
    rng = random.Random(seed)
    return [
        gated(
            seed + i,
            f"s{rng.randrange(count)}",
            threshold,
            others=rng.randrange(4),
            blocked=some_keys(rng.randrange(4), seed - i - 1),
        )
        for i in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(-0.99, 0.99))
def test_the_change_is_the_definition(seed: int, count: int, threshold: float) -> None:
    """The batched change equals the definition at each key, for any thresholds and shared subjects."""
    rng = random.Random(seed)
    associations = random_associations(seed, count, threshold)
    keys = torch.cat([some_keys(5, seed), *(a.key[None] * rng.uniform(0.2, 3) for a in associations)])
    assume(all(abs(s) > 1e-6 for k in keys for s in scores_of(associations, k).values()))
    change = dense_change(rows_of(associations), keys)
    expected = torch.stack([change_by_definition(associations, k) for k in keys])
    torch.testing.assert_close(change.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([-0.9, 0.3, 0.5, 0.8]),
    st.sampled_from([100, 2**22]),
)
def test_versions_in_one_batch_are_the_versions_alone(
    seed: int, sequences: int, length: int, threshold: float, max_products: int
) -> None:
    """Sequences at random subsets of the rows, in one batch, have bit for bit the change that each of their keys has
    alone, in a table with the rows of its own version only."""
    rng = random.Random(seed)
    associations = random_associations(seed, 10, threshold)
    table = new_table()
    subsets = [rng.sample(associations, rng.randrange(11)) for _ in range(sequences)]
    versions = [rows_of(subset, table) if subset else None for subset in subsets]
    assume(any(v is not None for v in versions))
    keys = torch.stack(
        [
            rng.choice(associations).key + rng.random() * some_keys(1, seed + i)[0]
            for i in range(sequences * length)
        ]
    )
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(gated_rows, "MAX_PRODUCTS", max_products)
        found = change_of_batch(keys, versions)
    together = {} if found is None else dict(zip(found.tokens.tolist(), found.changes, strict=True))
    for token, key in enumerate(keys):
        subset = subsets[token // length]
        alone = rows_of(subset).change(key[None].clone()) if subset else None
        assert (alone is None) == (token not in together)
        if alone is not None:
            assert torch.equal(alone.changes[0], together[token])


def test_a_sequence_without_rows_is_left_alone() -> None:
    """At a key that opens a gate of one version, a sequence of the base model beside it has no change."""
    a = gated(1)
    keys = a.key.expand(4, -1)
    found = change_of_batch(keys, [None, rows_of([a])])
    assert found is not None and found.tokens.tolist() == [2, 3]
    with pytest.raises(ValueError, match="4 keys are not those of 3 sequences"):
        change_of_batch(keys, [None, None, rows_of([a])])


@pytest.mark.parametrize("max_products", [1, 50, 2**22])
def test_a_key_decides_alone(max_products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change at a key does not depend on the keys that are beside it in a batch, bit for bit, however the batch is
    divided."""
    monkeypatch.setattr(gated_rows, "MAX_PRODUCTS", max_products)
    associations = [gated(i, blocked=some_keys(3, i), threshold=0.2) for i in range(20)]
    rows = rows_of(associations)
    keys = torch.cat([some_keys(30), torch.stack([a.key for a in associations])])
    together = dense_change(rows, keys)
    alone = torch.cat([dense_change(rows, k[None]) for k in keys])
    assert torch.equal(together, alone)
    assert together.any(1).sum() > 20


def test_equal_keys_are_equal_anywhere() -> None:
    """A blocked key that is also a key of the association closes the gate at it, whatever its place among others is:
    the cosines are the same to the last bit."""
    for seed in range(50):
        a = gated(seed, threshold=0.1)
        assert a.gate is not None
        blocked = torch.cat([SPACE.project(some_keys(seed % 5, seed)), a.gate.keys[:1]])
        closed = replace(a, gate=replace(a.gate, keys=a.gate.keys[:1], blocked=blocked))
        assert rows_of([closed]).change(a.key[None]) is None


def test_the_first_of_equal_associations_is_the_nearest() -> None:
    """Of two subjects with the same keys the one with the lesser edit id acts, in whatever order the rows came."""
    key = some_keys(1)[0]
    first, second = gated(1, key=key, others=0), gated(2, key=key, others=0)
    for order in ([first, second], [second, first]):
        torch.testing.assert_close(dense_change(rows_of(order), key[None]), first.value[None])


def test_a_blocked_key_opens_nothing() -> None:
    """At the key of another subject that comes near the association stays closed, and open at its own key."""
    own = gated(1, threshold=0.5)
    other = own.key + 0.3 * some_keys(1)[0]
    assert rows_of([own]).change(other[None]) is not None
    rows = rows_of([gated(1, threshold=0.5, blocked=other[None])])
    assert rows.change(other[None]) is None
    torch.testing.assert_close(dense_change(rows, own.key[None]), own.value[None])


def test_nothing_open_is_no_change() -> None:
    """Keys below every threshold leave the output to the base, and keys that are not finite, too."""
    rows = rows_of([gated(i) for i in range(5)])
    assert rows.change(some_keys(50)) is None
    assert rows.change(torch.full((3, D), torch.nan)) is None
    assert rows.change(torch.full((3, D), torch.inf)) is None


def unlimited_keys(associations: list[Association]) -> Tensor:
    """Return keys at which the response of every association is between 0 and 1."""
    keys = some_keys(2000)
    responses = torch.stack([keys @ a.response_direction() for a in associations])
    kept = keys[((responses > 0) & (responses < 1)).all(0)]
    assert len(kept) > 10
    return kept


def test_one_open_association_is_the_rank_one_update() -> None:
    """An association that is open everywhere is ROME's rank-one update at every key where it is not limited."""
    a = gated(3, threshold=-1.01)
    keys = unlimited_keys([a])
    expected = keys.double() @ a.rank_one().dense().T
    torch.testing.assert_close(dense_change(rows_of([a]), keys).double(), expected, rtol=1e-5, atol=1e-5)


def test_one_open_subject_is_the_joint_form() -> None:
    """The associations of one subject that are open everywhere are what `compose_layer` solves, where they are not
    limited."""
    associations = [gated(i, "one", threshold=-1.01) for i in range(4)]
    keys = unlimited_keys(associations)
    solved = compose_layer([replace(a, gate=None) for a in associations]).dense()
    change = dense_change(rows_of(associations), keys).double()
    torch.testing.assert_close(change, keys.double() @ solved.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 10, 300])
def test_distinct_subjects_get_exactly_their_change_at_their_key(count: int) -> None:
    """However many associations are active, the change at a key is its own delta: there is no capacity to fill."""
    associations = [gated(i) for i in range(count)]
    change = dense_change(rows_of(associations), torch.stack([a.key for a in associations]))
    torch.testing.assert_close(change, torch.stack([a.value for a in associations]), rtol=1e-5, atol=1e-5)


def test_the_rows_are_a_function_of_the_set() -> None:
    """Order does not matter, and without an association the rows are those that never had it."""
    associations = [gated(i) for i in range(8)]
    rows = rows_of(associations)
    shuffled = rows_of(random.Random(1).sample(associations, 8))
    assert torch.equal(rows.digests(), shuffled.digests())
    keys = torch.cat([some_keys(9), torch.stack([a.key for a in associations])])
    assert torch.equal(dense_change(shuffled, keys), dense_change(rows, keys))
    reverted = rows_of(associations[1:])
    assert torch.equal(reverted.digests(), rows.digests()[1:])
    assert torch.equal(dense_change(reverted, keys[10:]), dense_change(rows, keys[10:]))
    assert reverted.change(keys[9:10]) is None


@pytest.mark.parametrize("threshold", [1.0, -1.01])
def test_thresholds_at_the_ends(threshold: float) -> None:
    """A threshold of 1 opens nowhere, and one below -1 everywhere."""
    change = rows_of([gated(1, threshold=threshold)]).change(some_keys(10))
    assert (change is None) == (threshold == 1.0)
    assert change is None or change.tokens.tolist() == list(range(10))


def test_changes_are_rounded_once() -> None:
    """The change of a subject with many facts is their sum in fp64, in the order of their edits, rounded to fp32 at the
    end."""
    associations = [gated(i, "one", key=some_keys(1)[0], others=0, threshold=0.5) for i in range(40)]
    key = associations[0].key
    total = torch.zeros(d, dtype=torch.float64)
    for a in associations:
        response = float(a.response_direction().double() @ key.double())
        total += min(1.0, max(0.0, response)) * a.value.double()
    assert torch.equal(dense_change(rows_of(associations), key[None])[0], total.float())


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


def test_rows_are_those_of_one_layer() -> None:
    """The layer is that of the space."""
    rows: GatedRows = rows_of([gated(1)])
    assert rows.layer == SPACE.layer
