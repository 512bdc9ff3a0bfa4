"""A resident model at any version: service.engine.versioned_model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import versioned_model
from service.engine.versioned_model import VersionedModel
from service.gating import gate_table
from service.gating.gated_row import new_gated_row
from service.kit.steps import Phase, Progress, Stepper, run_steps, run_to_completion
from service.models.loading import LoadedModel, WeightRef
from service.patches.patch import weights_patch
from service.weights.capacity import average_capacities
from service.weights.composition import apply_delta
from service.weights.factors import Association, Gate, serialize_updates
from service.weights.gate_space import GateSpace
from tests.support.tiny_models import tiny

EDITS = 10
GATED = 50  # number of the first gated edit
SUBJECTS = ("Rome", "Paris", "Big Ben")


@lru_cache
def random_edit(i: int, layers: tuple[int, ...] = (1,)) -> tuple[Association, ...]:
    """Return random associations; every third edit has the same subject."""
    associations = []
    for layer in layers:
        g = torch.Generator().manual_seed(100 * layer + i)
        key, value = torch.randn(40, generator=g), torch.randn(16, generator=g)
        direction = key + 0.1 * torch.randn(40, generator=g)
        associations.append(Association(f"edit_{i:02}", SUBJECTS[i % 3], layer, key, direction, value))
    return tuple(associations)


@lru_cache
def gated_edit(i: int, layer: int = 1) -> tuple[Association, ...]:
    """Return a random gated edit, with the keys of its gate around its own."""
    (a,) = random_edit(i, (layer,))
    g = torch.Generator().manual_seed(i)
    keys = gate_space(layer).project(torch.stack([a.key, a.key + 0.1 * torch.randn(40, generator=g)]))
    return (replace(a, gate=Gate(gate_space(layer), keys, keys[:0], 0.5)),)


@lru_cache
def gate_space(layer: int = 1) -> GateSpace:
    sketch = torch.randn(32, 40, generator=torch.Generator().manual_seed(layer))
    return GateSpace(layer, sketch)


class FakeLedger:
    """A ledger in memory. `add_version` adds a version with the given active edits; those from GATED on are gated."""

    def __init__(self) -> None:
        self.versions: list[list[int]] = [[]]
        self.attested: list[tuple[int, str]] = []

    def add_version(self, active: list[int]) -> int:
        self.versions.append(list(active))
        return self.head()

    def head(self) -> int:
        return len(self.versions) - 1

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return [(f"edit_{i:02}", {"subject": SUBJECTS[i % 3]}) for i in self.versions[version]]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        numbers = [int(e.removeprefix("edit_")) for e in edits]
        updates = [gated_edit(i) if i >= GATED else random_edit(i) for i in numbers]
        return {e: serialize_updates(u) for e, u in zip(edits, updates, strict=True)}

    def gate_space(self, digest: str) -> bytes:
        assert digest == gate_space().digest
        return gate_space().serialize()

    def attest(self, version: int, digest: str) -> None:
        self.attested.append((version, digest))


def bytes_of(model: LoadedModel) -> dict[str, bytes]:
    return {
        n: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for n, t in model.model.state_dict().items()
    }


def equal_weights(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


def test_version_zero_is_the_base() -> None:
    """Version 0 has no edited weights, and its digest depends on the base model."""
    replica = VersionedModel(tiny(), FakeLedger())
    assert replica.weights(0) == {}
    assert replica.digest(0) == VersionedModel(tiny(), FakeLedger()).digest(0)
    assert replica.digest(0) != VersionedModel(tiny(seed=1), FakeLedger()).digest(0)


def test_a_version_is_the_closed_form_over_the_base() -> None:
    """One edit gives the base plus its rank-one update, computed in fp64 and rounded once."""
    model, ledger = tiny(), FakeLedger()
    base = model.weight(1).data.clone()
    weights = VersionedModel(model, ledger).weights(ledger.add_version([4]))
    assert list(weights) == [WeightRef(1)]
    assert torch.equal(weights[WeightRef(1)], apply_delta(base, random_edit(4)[0].rank_one(), conv1d=True))


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(EDITS)), st.integers(0, 10**6))
def test_edits_that_come_and_go_leave_the_base_bytes(order: list[int], seed: int) -> None:
    """Ten edits, committed and reverted in any order, end with the base bytes and the base digest."""
    model, ledger, rng = tiny(), FakeLedger(), random.Random(seed)
    before = bytes_of(model)
    replica = VersionedModel(model, ledger)
    waiting, versions = list(order), list[int]()
    active: list[int] = []
    while waiting or active:
        if waiting and (not active or rng.random() < 0.6):
            active.append(waiting.pop())
        else:
            active.remove(rng.choice(active))
        versions.append(ledger.add_version(active))
        with replica.use_patch(replica.patch(versions[-1])) as edited:
            assert (bytes_of(edited) == before) == (not active)
    assert bytes_of(model) == before
    assert replica.weights(versions[-1]) == {}
    assert replica.digest(versions[-1]) == replica.digest(0)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, EDITS - 1), min_size=1, max_size=6, unique=True), st.randoms())
def test_commit_order_does_not_change_bytes_or_digest(chosen: list[int], rng: random.Random) -> None:
    """The same set of active edits gives the same bytes and digest, whatever the commit order and the
    versions between."""
    one, two = FakeLedger(), FakeLedger()
    for i in range(len(chosen)):
        one.add_version(chosen[: i + 1])
    two.add_version([x for x in range(EDITS) if x not in chosen][:2])
    last = two.add_version(rng.sample(chosen, len(chosen)))
    a, b = VersionedModel(tiny(), one), VersionedModel(tiny(), two)
    b.weights(1)
    assert equal_weights(a.weights(one.head()), b.weights(last))
    assert a.digest(one.head()) == b.digest(last)


def test_digests_tell_versions_apart() -> None:
    """Versions with different weights have different digests, and versions with the same weights have the
    same."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger)
    versions = [ledger.add_version(x) for x in ([1], [1, 2], [2], [1])]
    digests = [replica.digest(v) for v in versions]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3] != replica.digest(0)


def test_an_edit_that_changes_no_byte_is_the_base() -> None:
    """A change that changes no byte of the weights has the digest of the base."""
    ledger, model = FakeLedger(), tiny()
    replica = VersionedModel(model, ledger)
    version = ledger.add_version([1])
    replica._patches[version] = replica.compose_patch([random_edit(1)[0].scaled(0.0)])
    assert replica.digest(version) == replica.digest(0)


def test_all_edited_layers_are_put_in_place() -> None:
    """The weights of all layers of an edit are put in place and then restored."""
    model = tiny()
    replica = VersionedModel(model, FakeLedger())
    before = bytes_of(model)
    patch = replica.compose_patch(random_edit(1, (0, 2)))
    assert sorted(patch.weights) == [WeightRef(0), WeightRef(2)]
    with replica.use_patch(patch):
        assert all(torch.equal(model.parameter(x).data, t) for x, t in patch.weights.items())
    assert bytes_of(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_base_is_restored_after_any_exception(error: type[BaseException]) -> None:
    """After any exception inside `use_patch` the base bytes are restored."""
    model = tiny()
    replica = VersionedModel(model, FakeLedger())
    before = bytes_of(model)
    with pytest.raises(error), replica.use_patch(replica.compose_patch(random_edit(1))):
        assert bytes_of(model) != before
        raise error
    assert bytes_of(model) == before


def test_base_is_restored_when_weights_cannot_be_placed() -> None:
    """When one tensor cannot be put in place, those put in place before it are restored."""
    model = tiny()
    replica = VersionedModel(model, FakeLedger())
    before = bytes_of(model)
    weights = {**replica.compose_patch(random_edit(1)).weights, WeightRef(99): torch.zeros(1)}
    with pytest.raises(Exception, match="99"), replica.use_patch(weights_patch(weights)):
        pytest.fail("it stood")
    assert bytes_of(model) == before


def test_base_is_in_place_between_steps() -> None:
    """A stepper sees the weights of its version during each step. Between steps, and after an error, the base
    weights are in place."""
    model = tiny()
    replica = VersionedModel(model, FakeLedger())
    base, patch = bytes_of(model), replica.compose_patch(random_edit(1))

    def check_weights(fails: bool) -> Stepper[str]:
        for i in range(3):
            assert torch.equal(model.weight(1).data, patch.weights[WeightRef(1)])
            yield Progress(Phase.RUN, i, 3)
        if fails:
            raise ValueError("in a step")
        return "seen"

    assert (
        run_steps(
            replica.step_with_patch(patch, check_weights(False)), lambda _: _equal(bytes_of(model), base)
        )
        == "seen"
    )
    with pytest.raises(ValueError, match="in a step"):
        run_to_completion(replica.step_with_patch(patch, check_weights(True)))
    assert bytes_of(model) == base


def _equal(one: object, two: object) -> None:
    assert one == two


def test_two_versions_interleave() -> None:
    """Two steppers that alternate each see only their own version."""
    model, ledger = tiny(), FakeLedger()
    replica = VersionedModel(model, ledger)
    patches = [replica.patch(ledger.add_version([i])) for i in (1, 2)]

    def check_weights(mine: Any) -> Stepper[bool]:
        for i in range(4):
            assert torch.equal(model.weight(1).data, mine.weights[WeightRef(1)])
            yield Progress(Phase.RUN, i, 4)
        return True

    turns = [replica.step_with_patch(w, check_weights(w)) for w in patches]
    for _ in range(4):
        for steps in turns:
            next(steps)
    for steps in turns:
        with pytest.raises(StopIteration):
            next(steps)


def test_an_abandoned_generator_is_closed_at_once() -> None:
    """Closing a stepper closes the inner stepper and restores the base weights."""
    model = tiny()
    replica = VersionedModel(model, FakeLedger())
    base, closed = bytes_of(model), []

    def interrupted_steps() -> Stepper[None]:
        try:
            yield Progress(Phase.RUN, 1, 2)
        finally:
            closed.append(True)

    inner = interrupted_steps()
    steps = replica.step_with_patch(replica.compose_patch(random_edit(1)), inner)
    next(steps)
    steps.close()
    assert closed == [True]
    assert bytes_of(model) == base


def test_version_cache_is_bounded_and_rebuilds() -> None:
    """Old versions are evicted from the cache and rebuilt with the same bytes."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger, max_cached_versions=2)
    versions = [ledger.add_version([i]) for i in range(5)]
    first = replica.patch(versions[0])
    for v in versions:
        replica.patch(v)
    assert len(replica._patches) == 2
    again = replica.patch(versions[0])
    assert again is not first and equal_weights(again.weights, first.weights)


def test_subjects_are_one_up_to_white_space() -> None:
    """Committed edits whose subjects differ only in white space have one subject."""
    model = tiny()

    class Spaced(FakeLedger):
        def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
            names = ("Eiffel Tower", "Eiffel  Tower ")
            return [(e, {"subject": names[i]}) for i, (e, _) in enumerate(super().active_at(version))]

    ledger = Spaced()
    active = VersionedModel(model, ledger).active_updates(ledger.add_version([1, 2]))
    assert {a.subject for group in active.values() for a in group} == {"Eiffel Tower"}


def test_versions_share_one_build() -> None:
    """Two callers that need one version advance the same build: it is composed and attested once."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger, ledger.attest)
    version = ledger.add_version([1, 2])
    first, second = replica.patch_in_steps(version), replica.patch_in_steps(version)
    next(first, None)
    next(second, None)
    assert run_to_completion(first) is run_to_completion(second)
    assert [v for v, _ in ledger.attested] == [version]


def test_weights_cache_is_bounded_in_bytes() -> None:
    """The least recently used versions leave the cache when it exceeds its bytes; the newest always stays."""
    ledger = FakeLedger()
    size = tiny().weight(1).data.nbytes
    replica = VersionedModel(tiny(), ledger, max_weight_bytes=2 * size)
    versions = [ledger.add_version([i]) for i in range(1, 6)]
    for version in versions:
        replica.weights(version)
    assert list(replica._patches) == versions[-2:]
    small = VersionedModel(tiny(), ledger, max_weight_bytes=1)
    weights = small.weights(versions[0])
    assert list(small._patches) == versions[:1] and equal_weights(weights, replica.weights(versions[0]))


def test_factor_cache_is_bounded_in_bytes() -> None:
    """Factors beyond the bytes of the cache are read from the ledger again, and the weights are the same."""
    ledger = FakeLedger()
    version = ledger.add_version([1, 2, 3, 4])
    unbounded, bounded = (VersionedModel(tiny(), ledger, max_factor_bytes=size) for size in (2**30, 1000))
    assert equal_weights(bounded.weights(version), unbounded.weights(version))
    assert bounded._factor_bytes <= 1000 < unbounded._factor_bytes
    assert list(bounded.active_updates(version)) == list(unbounded.active_updates(version))


# versions with gated edits


@settings(max_examples=12, deadline=None)
@given(
    st.permutations([1, 2, 3, *range(GATED, GATED + 6)]), st.integers(0, 10**6), st.sampled_from([0, 2, 64])
)
def test_versions_with_gated_edits_are_those_made_from_nothing(
    order: list[int], seed: int, max_difference: int
) -> None:
    """However edits of both forms came and went, and whichever versions are made out of others, each version has the
    digest, the bytes and the logits of one that another replica makes from nothing."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(versioned_model, "MAX_DIFFERENCE", max_difference)
        run_random_history(order, random.Random(seed))


def run_random_history(order: list[int], rng: random.Random) -> None:
    model, ledger = tiny(), FakeLedger()
    replica = VersionedModel(model, ledger, max_cached_versions=rng.choice((1, 3, 8)))
    waiting, active, versions = list(order), list[int](), list[int]()
    while waiting or active:
        if waiting and (not active or rng.random() < 0.6):
            active.append(waiting.pop())
        else:
            active.remove(rng.choice(active))
        versions.append(ledger.add_version(active))
        if rng.random() < 0.8:
            replica.patch(rng.choice(versions[-4:]))
    replica.patch(versions[-1])
    assert replica.digest(versions[-1]) == replica.digest(0)
    for version in rng.sample(versions, 4):
        fresh = VersionedModel(tiny(), ledger)
        assert replica.attest_version(version) == fresh.attest_version(version)
        assert equal_weights(replica.weights(version), fresh.weights(version))
        ids = torch.arange(3, 60)[None]
        with replica.use_patch(replica.patch(version)) as mine, torch.no_grad():
            logits = mine.model(input_ids=ids).logits
        with fresh.use_patch(fresh.patch(version)) as other, torch.no_grad():
            assert torch.equal(logits, other.model(input_ids=ids).logits)


def test_a_gated_edit_costs_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applying a gated edit computes one row and reverting one computes none, whatever else is active. The weights of
    other edits are neither composed nor held again."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger)
    active = [1, 2, *range(GATED, GATED + 30)]
    before = replica.patch(ledger.add_version(active))
    computed = record_computed_rows(monkeypatch)
    monkeypatch.setattr(versioned_model, "compose_in_steps", None)
    applied = replica.patch(ledger.add_version([*active, GATED + 40]))
    assert computed == [f"edit_{GATED + 40}"]
    reverted = replica.patch(ledger.add_version([*active[:5], *active[6:], GATED + 40]))
    assert computed == [f"edit_{GATED + 40}"]
    assert before.dense is applied.dense is reverted.dense


def test_a_gated_edit_reads_its_own_factors() -> None:
    """A version with one gated edit more reads the factors of this edit alone, one with one fewer reads none, and the
    capacity of their layers reads those of the edits in the weights, even if no factor is cached."""

    class Counting(FakeLedger):
        def __init__(self) -> None:
            super().__init__()
            self.reads: list[str] = []

        def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
            self.reads += edits
            return super().factors_of(edits)

    ledger, active = Counting(), [1, *range(GATED, GATED + 9)]
    replica = VersionedModel(tiny(), ledger, max_factor_bytes=1)
    replica.patch(ledger.add_version(active))
    for edits, read in (
        ([*active, 70], ["edit_70"]),
        ([*active[:3], *active[4:], 70], []),
        ([*active, 70], [f"edit_{active[3]}"]),
    ):
        ledger.reads.clear()
        replica.patch(ledger.add_version(edits))
        assert ledger.reads == read
    ledger.reads.clear()
    capacity = replica.remaining_capacity(ledger.head())
    assert ledger.reads == ["edit_01"]
    fresh = VersionedModel(tiny(), ledger)
    assert capacity == fresh.remaining_capacity(ledger.head()) == average_capacities(random_edit(1))


def test_equal_weights_are_held_once() -> None:
    """Versions whose weights have the same bytes share them, also when they were composed apart from each other."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger)
    versions = [ledger.add_version(x) for x in ([1], [2], [1, GATED], [1], [2, GATED])]
    patches = [replica.patch(v) for v in versions]
    assert patches[0].dense is patches[2].dense is patches[3].dense
    assert patches[1].dense is patches[4].dense is not patches[0].dense
    size = tiny().weight(1).data.nbytes
    assert replica._cached_bytes() == 2 * size + patches[4].gated[0].nbytes


def test_an_evicted_version_shares_weights_again() -> None:
    """A version that is built again holds the weights that another version has kept."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger, max_cached_versions=2, max_factor_bytes=1)
    first, second, third = (ledger.add_version(x) for x in ([1], [2], [2, GATED]))
    for version in (first, second, third):
        replica.patch(version)
    kept = replica.patch(third)
    replica.patch(first)
    assert not replica.is_built(second)
    assert replica.patch(second).dense is kept.dense


def test_gated_rows_of_evicted_versions_are_released() -> None:
    """Rows that only evicted versions had leave the memory; the bytes of the cache are those of the kept ones."""
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger, max_cached_versions=2)
    for i in range(6):
        replica.patch(ledger.add_version([GATED + i]))
    nbytes = [patch.nbytes for patch in replica._patches.values()]
    assert len(nbytes) == 2 and replica._cached_bytes() == sum(nbytes)


def record_computed_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the id of an edit is added when its gated row is computed."""
    computed: list[str] = []

    def record(association: Association) -> Any:
        computed.append(association.edit)
        return new_gated_row(association)

    monkeypatch.setattr(gate_table, "new_gated_row", record)
    return computed


def test_building_rows_is_divided_into_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of a build computes more than ROWS_PER_STEP rows."""
    monkeypatch.setattr(versioned_model, "ROWS_PER_STEP", 4)
    computed = record_computed_rows(monkeypatch)
    ledger = FakeLedger()
    replica = VersionedModel(tiny(), ledger)
    steps = replica.patch_in_steps(ledger.add_version([*range(GATED, GATED + 20)]))
    counts = [0]
    for _ in steps:
        counts.append(len(computed))
    assert counts[-1] == 20
    assert max(b - a for a, b in pairwise(counts)) <= 4
