"""Codebooks of GRACE: service.codebooks.codebook."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.codebooks.codebook import Codebook, build_codebook, distances_between
from service.weights.factors import CodebookEntry, deserialize_updates, serialize_updates, weight_updates

D, d, LAYER = 6, 4, 3


def entry(
    i: int,
    label: int = 0,
    radius: float = 1.0,
    key: Tensor | None = None,
    replayed: bool = False,
    spread: float = 1.0,
) -> CodebookEntry:
    """An entry with a random key."""
    g = torch.Generator().manual_seed(i)
    drawn = spread * torch.randn(D, generator=g)
    return CodebookEntry(
        f"edit_{i:05}",
        f"s{i}",
        LAYER,
        drawn if key is None else key,
        torch.randn(d, generator=g),
        torch.randn(d, generator=g),
        radius,
        (label, 7),
        replayed,
    )


def random_entries(seed: int, count: int, replayed: bool = False) -> list[CodebookEntry]:
    """Entries with few labels, near each other and with different radii."""
    rng = random.Random(seed)
    return [
        entry(seed * 100 + i, rng.randrange(3), rng.uniform(0.05, 2.5), replayed=replayed, spread=0.6)
        for i in range(count)
    ]


def some_inputs(entries: Sequence[CodebookEntry], seed: int) -> Tensor:
    """Inputs at the keys, around them, and anywhere."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.stack([e.key for e in entries])
    around = [keys + size * torch.randn(keys.shape, generator=g) for size in (0.1, 0.3, 0.6)]
    return torch.cat([keys, *around, torch.randn(20, D, generator=g)])


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))


def radius_by_definition(entries: Sequence[CodebookEntry], i: int) -> float:
    """min(e0_i, half of the distance to the nearest key of another label)."""
    mine = entries[i]
    others = [distance(mine.key, e.key) / 2 for e in entries if e.label != mine.label]
    return min([mine.radius, *others])


def look_up_one_by_one(
    keys: Sequence[Tensor], radii: Sequence[float], values: Sequence[Tensor], x: Tensor
) -> Tensor | None:
    """The value of the nearest key if its ball contains x; the first key among equals."""
    distances = [distance(x, k) for k in keys]
    nearest = distances.index(min(distances))
    return values[nearest] if distances[nearest] <= radii[nearest] else None


def outputs(book: Codebook, inputs: Tensor) -> list[Tensor | None]:
    """The value at each input, None where nothing opens."""
    found: list[Tensor | None] = [None] * len(inputs)
    if (chosen := book.look_up(inputs)) is not None:
        for row, value in zip(chosen[0].tolist(), chosen[1], strict=True):
            found[row] = value
    return found


def assert_equal_outputs(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> None:
    assert [x is None for x in one] == [x is None for x in other]
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None)


def is_clear(keys: Sequence[Tensor], radii: Sequence[float], inputs: Tensor) -> bool:
    """Whether no input lies on the edge of a ball, or as near to two keys, up to rounding."""
    for x in inputs:
        distances = sorted((distance(x, k), r) for k, r in zip(keys, radii, strict=True))
        if any(abs(far - r) < 1e-6 for far, r in distances):
            return False
        if any(1e-9 < b[0] - a[0] < 1e-6 for a, b in pairwise(distances)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 10))
def test_the_output_is_the_definition(seed: int, count: int) -> None:
    """Radii and look-ups are those of the definition, one pair of keys and one input at a time."""
    entries = random_entries(seed, count)
    book = build_codebook(entries)
    radii = [radius_by_definition(entries, i) for i in range(count)]
    assert book.radii.tolist() == pytest.approx(radii, abs=1e-6)
    inputs = some_inputs(entries, seed)
    keys, values = [e.key for e in entries], [e.value for e in entries]
    assume(is_clear(keys, radii, inputs))
    expected = [look_up_one_by_one(keys, radii, values, x) for x in inputs]
    assert_equal_outputs(outputs(book, inputs), expected)


@dataclass
class PublishedCodebook:
    """The algorithm of the published code, edit by edit, with values that an edit sets at once."""

    keys: list[Tensor]
    radii: list[float]
    labels: list[tuple[int, ...]]
    values: list[Tensor]

    def edit(self, q: Tensor, e0: float, label: tuple[int, ...], value: Tensor) -> None:
        if not self.keys:
            self.add(q, e0, label, value)
            return
        distances = [distance(q, k) for k in self.keys]
        d = min(distances)
        i = distances.index(d)
        if d > e0 + self.radii[i]:
            self.add(q, e0, label, value)
        elif self.labels[i] != label:
            self.radii[i] = d / 2 - 1e-5
            self.add(q, d / 2, label, value)
        else:
            if d > self.radii[i]:
                self.radii[i] = d
            self.values[i] = value

    def add(self, q: Tensor, radius: float, label: tuple[int, ...], value: Tensor) -> None:
        self.keys.append(q)
        self.radii.append(radius)
        self.labels.append(label)
        self.values.append(value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_replayed_radii_are_those_of_the_published_code(seed: int, count: int, shuffled: bool) -> None:
    """Entries with `compat` have the rows that adding them one after another in the order of their ids gives, in
    whatever order they are handed over."""
    entries = random_entries(seed, count, replayed=True)
    published = PublishedCodebook([], [], [], [])
    for e in entries:
        published.edit(e.key, e.radius, e.label, e.value)
    book = build_codebook(random.Random(seed).sample(entries, count) if shuffled else entries)
    assert book.radii.tolist() == pytest.approx(published.radii, abs=1e-6)
    assert torch.equal(book.keys, torch.stack(published.keys).double())
    assert torch.equal(book.values, torch.stack(published.values))
    inputs = some_inputs(entries, seed)
    assume(is_clear(published.keys, published.radii, inputs))
    expected = [look_up_one_by_one(published.keys, published.radii, published.values, x) for x in inputs]
    assert_equal_outputs(outputs(book, inputs), expected)


def test_the_published_code_depends_on_the_order() -> None:
    """What `compat` reproduces is no function of the set without an order: another order of ids has other radii."""
    first, second = entry(1, 0, key=torch.zeros(D), replayed=True), entry(2, 1, replayed=True)
    near = replace(second, key=torch.full((D,), 0.2))
    far = entry(3, 1, key=torch.full((D,), 0.6), replayed=True)
    one = build_codebook([first, near, far])
    other = build_codebook([first, replace(far, edit="edit_00002"), replace(near, edit="edit_00003")])
    assert sorted(one.radii.tolist()) != pytest.approx(sorted(other.radii.tolist()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_balls_of_different_labels_are_disjoint(seed: int, count: int) -> None:
    """The radii of two labels add up to at most the distance of their keys."""
    entries = random_entries(seed, count)
    radii = build_codebook(entries).radii.tolist()
    for i, one in enumerate(entries):
        for j, other in enumerate(entries):
            if one.label != other.label:
                assert radii[i] + radii[j] <= distance(one.key, other.key) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_the_codebook_is_a_function_of_the_set(seed: int, count: int) -> None:
    """Order does not matter, and an entry that is inserted and removed leaves the bytes of the codebook that never had
    it. Both hold for replayed entries, too."""
    rng = random.Random(seed)
    for replayed in (False, True):
        entries = random_entries(seed, count, replayed)
        book = build_codebook(entries)
        shuffled = build_codebook(rng.sample(entries, count))
        assert all(torch.equal(t, shuffled.tensors()[name]) for name, t in book.tensors().items())
        gone = rng.randrange(count)
        kept = entries[:gone] + entries[gone + 1 :]
        again = build_codebook([e for e in rng.sample(entries, count) if e is not entries[gone]])
        assert all(torch.equal(t, again.tensors()[n]) for n, t in build_codebook(kept).tensors().items())


def test_at_its_key_the_value_is_exact() -> None:
    """At the key of an entry the output is its value, bit for bit, however many others are active."""
    entries = [entry(i, label=i, radius=0.5) for i in range(300)]
    found = outputs(build_codebook(entries), torch.stack([e.key for e in entries]))
    assert_equal_outputs(found, [e.value for e in entries])


def test_outside_every_ball_nothing_opens() -> None:
    """Inputs that no ball contains have no value."""
    book = build_codebook([entry(i, radius=0.1) for i in range(5)])
    assert book.look_up(10 + torch.rand(30, D)) is None


def test_an_input_that_is_not_finite_opens_nothing() -> None:
    """NaN and infinity are in no ball."""
    book = build_codebook([entry(i, radius=1e6) for i in range(3)])
    assert book.look_up(torch.full((2, D), torch.nan)) is None
    assert book.look_up(torch.full((2, D), torch.inf)) is None


def test_equal_keys_of_two_labels_have_no_ball() -> None:
    """Two objects at one key leave no room for either, and at one label the first of two values counts."""
    key = torch.ones(D)
    two = [entry(1, 0, key=key), entry(2, 1, key=key)]
    assert build_codebook(two).radii.tolist() == [0.0, 0.0]
    same = [entry(1, 0, key=key), entry(2, 0, key=key)]
    (found,) = outputs(build_codebook(same), key[None] + 0.01)
    assert found is not None
    assert torch.equal(found, same[0].value)


def test_labels_are_compared_as_sequences() -> None:
    """Objects with the same tokens in another order, and so the same mean, are different objects."""
    one = replace(entry(1, key=torch.zeros(D)), label=(5, 9))
    other = replace(entry(2, key=torch.full((D,), 0.1)), label=(9, 5))
    assert build_codebook([one, other]).radii.tolist() == pytest.approx([0.05 * D**0.5] * 2)
    replayed = build_codebook([replace(one, replayed=True), replace(other, replayed=True)])
    assert len(replayed.radii) == 2


def test_an_input_decides_alone() -> None:
    """What opens at an input does not depend on the inputs beside it."""
    entries = random_entries(5, 12)
    book, inputs = build_codebook(entries), some_inputs(entries, 5)
    together = outputs(book, inputs)
    alone = [outputs(book, x[None])[0] for x in inputs]
    assert any(x is not None for x in together) and any(x is None for x in together)
    assert_equal_outputs(together, alone)


def test_both_forms_share_a_codebook() -> None:
    """Entries with and without `compat` are in one codebook, and do not change the radii of each other."""
    free, replayed = random_entries(1, 4), random_entries(2, 4, replayed=True)
    both = build_codebook([*replayed, *free]).radii.tolist()
    alone = build_codebook(free).radii.tolist() + build_codebook(replayed).radii.tolist()
    assert both == pytest.approx(alone)


def test_distances_are_those_of_fp64() -> None:
    """The distances equal the norms of differences, also of large and near rows."""
    g = torch.Generator().manual_seed(1)
    keys = 100 * torch.randn(20, 400, generator=g)
    rows = torch.cat([keys[:5] + 1e-3 * torch.randn(5, 400, generator=g), torch.randn(7, 400, generator=g)])
    expected = torch.tensor([[distance(x, k) for k in keys] for x in rows], dtype=torch.float64)
    torch.testing.assert_close(distances_between(rows, keys), expected, rtol=1e-9, atol=1e-4)


def test_the_strength_scales_the_difference_from_the_output() -> None:
    """Strength 1 is the value itself, and 0.5 lies in the middle between it and the layer's own output."""
    e = entry(1)
    assert torch.equal(e.scaled(1).value, e.value)
    torch.testing.assert_close(e.scaled(0.5).value, (e.value + e.output) / 2)


@pytest.mark.parametrize("replayed", [False, True])
def test_an_entry_is_stored_bit_for_bit(replayed: bool) -> None:
    """Serialized factors keep every part of an entry, and it changes no weight."""
    e = replace(entry(1, replayed=replayed), radius=1 / 3, label=(-1, 5))
    (read,) = deserialize_updates(serialize_updates([e]), e.edit, e.subject)
    assert isinstance(read, CodebookEntry)
    tensors = ("key", "output", "value")
    assert all(torch.equal(getattr(read, name), getattr(e, name)) for name in tensors)
    rest = ("edit", "subject", "layer", "radius", "label", "replayed")
    assert [getattr(read, name) for name in rest] == [getattr(e, name) for name in rest]
    assert list(weight_updates([read])) == []


def test_the_ball_of_an_entry_is_reported() -> None:
    """The report has the radius beside the other entries and the nearest of them; a replayed entry without a row of its
    own has no radius."""
    one, other = entry(1, 0, 5.0, torch.zeros(D)), entry(2, 1, 5.0, torch.full((D,), 2.0))
    far = 2 * D**0.5
    alone, both = build_codebook([one]).ball_of(one), build_codebook([one, other]).ball_of(one)
    assert (alone.first_radius, alone.radius, alone.nearest, alone.nearest_edit) == (5.0, 5.0, None, None)
    assert (both.radius, both.nearest) == pytest.approx((far / 2, far))
    assert both.nearest_edit == other.edit
    same = replace(other, label=one.label, replayed=True)
    shared = build_codebook([replace(one, replayed=True), same]).ball_of(same)
    assert (shared.radius, shared.nearest_edit) == (None, one.edit)
