"""A resident model at any version: service.engine.versioned_model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.versioned_model import VersionedModel
from service.kit.steps import Phase, Progress, Stepper, run_steps, run_to_completion
from service.models.loading import LoadedModel, WeightRef
from service.patches.patch import weights_patch
from service.weights.composition import apply_delta
from service.weights.factors import Association, serialize_updates
from tests.support.tiny_models import tiny

EDITS = 10
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


class FakeLedger:
    """A ledger in memory. `add_version` adds a version with the given active edits."""

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
        return {e: serialize_updates(random_edit(int(e.removeprefix("edit_")))) for e in edits}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)

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
