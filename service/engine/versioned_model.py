"""A resident model that serves any version, rebuilt from its untouched base bytes.

Edited tensors are put in place by exchanging pointers and are taken out after every step. Between steps the model holds
its base bytes, so an error during a step leaves nothing behind.

Building a version (reading its edits, composing, hashing, attesting) is a stepper, whose steps stay short whatever the
number of active edits. Callers that need the same version share one build: each advances it.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from service.codebooks.codebook import build_codebook_in_steps
from service.errors import DigestMismatch
from service.gating.gate_table import GateTable
from service.gating.gated_row import GatedRow
from service.gating.gated_rows import GatedRows, new_gated_rows
from service.kit import metrics
from service.kit.steps import Phase, Progress, Stepper, advance, run_to_completion, step_within
from service.kit.text import normalize_whitespace
from service.models import memory_estimates
from service.models.loading import LoadedModel, WeightRef
from service.patches.codebook_patch import CodebookPatch
from service.patches.gated_patch import GatedPatch
from service.patches.patch import BASE, DensePatch, PatchSet, apply_to_batch
from service.patches.record_patch import RecordPatch
from service.records.record_router import RecordRouter
from service.weights.capacity import average_capacities_in_steps
from service.weights.composition import apply_delta_in_steps, compose_in_steps
from service.weights.factors import (
    Association,
    CodebookEntry,
    EditUpdate,
    SharedFactors,
    StatementRecord,
    deserialize_shared,
    deserialize_updates,
    gate_of,
    weight_updates,
)
from service.weights.gate_space import GateSpace

T = TypeVar("T")
LedgerEdit = tuple[str, dict[str, Any]]  # the id of an edit, and the body of its entry
Place = tuple[int, str]  # a layer, and the digest of a gate space
MAX_CACHED_VERSIONS = 8  # versions whose weights are cached
CACHE_FRACTION = 0.1  # of the memory that is free at the start, for each cache
DEFAULT_CACHE_BYTES = 2**30  # for each cache, where the free memory is unknown
FACTORS_PER_STEP = 64  # edits whose factors one step reads
ROWS_PER_STEP = 256  # gated rows that one step looks up or computes
MAX_DIFFERENCE = 64  # edits that a version that is made out of another one may have more or fewer
DIGEST_BYTES = 2**23  # bytes that one step hashes


class ReplicaLedger(Protocol):
    """The read access to the ledger that a replica needs."""

    def head(self) -> int: ...

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]: ...

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]: ...

    def gate_space(self, digest: str) -> bytes: ...


class EmptyLedger:
    """A ledger without entries, for computations that compose edits themselves and commit none."""

    def head(self) -> int:
        return 0

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return []

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)


@dataclass(frozen=True)
class _ActiveEdits:
    """The ids of the edits that are active at a version, and of those that are not only gated rows."""

    edits: frozenset[str]
    not_gated: frozenset[str]


@dataclass
class _VersionBuild:
    """A version that is being built, and the seconds that its steps took."""

    stepper: Stepper[None]
    seconds: float = 0.0


class VersionedModel:
    """One resident model and the ledger that it follows. Not thread-safe: it belongs to the engine's thread.

    `attest` is called once for each version with the digest of its weights, before they are used; it raises
    DigestMismatch when other replicas hold other bytes. Without it versions are not attested.

    The caches of versions (edited weights on the devices of their layers, and gated rows) and of edit factors (in host
    memory) evict their least recently used entries beyond `max_weight_bytes` and `max_factor_bytes`. The default of
    each is a share of the free memory. Versions with the same edited weights hold them once, and a gated row is held
    once by all versions at which it is active.
    """

    def __init__(
        self,
        model: LoadedModel,
        ledger: ReplicaLedger,
        attest: Callable[[int, str], None] | None = None,
        *,
        max_cached_versions: int = MAX_CACHED_VERSIONS,
        max_weight_bytes: int | None = None,
        max_factor_bytes: int | None = None,
    ) -> None:
        self.base = model
        self.ledger = ledger
        self.applied_patches = 0  #: patches that are in place now
        self._attest = attest
        self._max_cached_versions = max_cached_versions
        self._max_weight_bytes = max_weight_bytes or _default_cache_bytes(
            memory_estimates.free_bytes_for_blocks(model)
        )
        self._max_factor_bytes = max_factor_bytes or _default_cache_bytes(
            memory_estimates.free_bytes(torch.device("cpu"))
        )
        self._patches: OrderedDict[int, PatchSet] = OrderedDict()
        self._active: dict[int, _ActiveEdits] = {}  # of cached versions
        self._shared_factors: dict[str, SharedFactors] = {}
        self._tables: dict[Place, GateTable] = {}
        self._last_dense = _ComposedWeights()
        self._dense_hashes: WeakKeyDictionary[DensePatch, hashlib._Hash] = WeakKeyDictionary()
        self._dense_by_digest: WeakValueDictionary[str, DensePatch] = WeakValueDictionary()
        self._dense_digests: dict[int, str] = {}  # of the attested versions
        self._attested: dict[int, str] = {}
        self._builds: dict[int, _VersionBuild] = {}
        self._updates: OrderedDict[str, list[EditUpdate]] = OrderedDict()
        self._factor_bytes = 0
        self._original = {site: model.parameter(site).data for site in model.editable_weights}

    def head(self) -> int:
        """Return the newest version of the ledger."""
        return self.ledger.head()

    # edits of a version

    def active_updates(self, version: int) -> dict[str, list[EditUpdate]]:
        """Run `active_updates_in_steps` to completion."""
        return run_to_completion(self.active_updates_in_steps(version))

    def active_updates_in_steps(self, version: int) -> Stepper[dict[str, list[EditUpdate]]]:
        """Return the updates of every edit that is active at a version, by the edit's id."""
        return (yield from self._read_updates(self.ledger.active_at(version)))

    def _read_updates(self, edits: Sequence[LedgerEdit]) -> Stepper[dict[str, list[EditUpdate]]]:
        """Return the updates of edits in their order, by the edit's id."""
        updates = {edit: self._updates[edit] for edit, _ in edits if edit in self._updates}
        for edit in updates:
            self._updates.move_to_end(edit)
        missing = {edit: body for edit, body in edits if edit not in updates}
        for start in range(0, len(missing), FACTORS_PER_STEP):
            batch = list(missing)[start : start + FACTORS_PER_STEP]
            factors = self.ledger.factors_of(batch)
            for edit in batch:
                subject = normalize_whitespace(str(missing[edit]["subject"]))
                updates[edit] = deserialize_updates(factors[edit], edit, subject, self.find_shared)
                self._cache_updates(edit, updates[edit])
            yield Progress(Phase.COMPOSE, start + len(batch), len(missing))
        return {edit: updates[edit] for edit, _ in edits}

    def _cache_updates(self, edit: str, updates: list[EditUpdate]) -> None:
        if edit not in self._updates:  # another stepper may have read it meanwhile
            self._updates[edit] = updates
            self._factor_bytes += _factor_bytes(updates)
        while self._factor_bytes > self._max_factor_bytes:
            _, oldest = self._updates.popitem(last=False)
            self._factor_bytes -= _factor_bytes(oldest)

    # weights of a version

    def compose_patch(self, updates: Iterable[EditUpdate]) -> PatchSet:
        """Run `compose_patch_in_steps` to completion."""
        return run_to_completion(self.compose_patch_in_steps(updates))

    def compose_patch_in_steps(self, updates: Iterable[EditUpdate]) -> Stepper[PatchSet]:
        """Return the patches for a set of updates: the edited weights, computed from the base bytes, the rows of gated
        associations, codebooks, and statement records."""
        updates = list(updates)
        dense = yield from self._compose_weights(list(weight_updates(updates)))
        gated = yield from self._gated_patches(updates)
        codebooks = yield from self._codebook_patches(updates)
        records = [u for u in updates if isinstance(u, StatementRecord)]
        routed = RecordPatch(RecordRouter(self.base, records)) if records else None
        return PatchSet(dense, tuple(gated), tuple(codebooks), routed)

    def _compose_weights(self, updates: Sequence[EditUpdate]) -> Stepper[DensePatch | None]:
        """Return the edited weights of updates without gates; those that were composed last, if the updates are the
        same."""
        if not updates:
            return None
        if (last := self._last_dense.find(updates)) is not None:
            return last
        deltas = yield from compose_in_steps(updates)
        weights: dict[WeightRef, Tensor] = {}
        for site, delta in deltas.items():
            weights[site] = yield from apply_delta_in_steps(
                self._original[site], delta, self.base.architecture.conv1d
            )
        dense = DensePatch(weights)
        self._last_dense = _ComposedWeights(updates, dense)
        return dense

    def _codebook_patches(self, updates: Sequence[EditUpdate]) -> Stepper[list[CodebookPatch]]:
        """Return the codebook of each layer, on the device of the layer."""
        entries: dict[int, list[CodebookEntry]] = {}
        for u in updates:
            if isinstance(u, CodebookEntry):
                entries.setdefault(u.layer, []).append(u)
        patches: list[CodebookPatch] = []
        for layer, group in sorted(entries.items()):
            codebook = yield from build_codebook_in_steps(group)
            patches.append(CodebookPatch(codebook.to(self.base.weight(layer).device)))
        return patches

    def _gated_patches(self, updates: Sequence[EditUpdate]) -> Stepper[list[GatedPatch]]:
        """Return the rows of each layer and gate space."""
        rows = yield from self._rows_by_place(updates)
        return [
            GatedPatch(new_gated_rows(self._tables[place], group)) for place, group in sorted(rows.items())
        ]

    def _rows_by_place(self, updates: Sequence[EditUpdate]) -> Stepper[dict[Place, list[GatedRow]]]:
        rows: dict[Place, list[GatedRow]] = {}
        for number, u in enumerate(updates):
            if isinstance(u, Association) and u.gate is not None:
                place = (u.layer, u.gate.space.digest)
                rows.setdefault(place, []).append(self._table(place, u.gate.space).row(u))
            if number % ROWS_PER_STEP == ROWS_PER_STEP - 1:
                yield Progress(Phase.COMPOSE, number, len(updates))
        return rows

    def _table(self, place: Place, space: GateSpace) -> GateTable:
        if place not in self._tables:
            self._tables[place] = GateTable(space, self.base.weight(place[0]).device)
        return self._tables[place]

    def find_shared(self, digest: str) -> SharedFactors:
        """Return what factors name by a digest from the ledger, read once. The digest is that of its content."""
        if digest not in self._shared_factors:
            found = deserialize_shared(self.ledger.gate_space(digest))
            if found.digest != digest:
                raise DigestMismatch(f"the gate space {digest} was changed in the database.")
            self._shared_factors[digest] = found
        return self._shared_factors[digest]

    def patch(self, version: int) -> PatchSet:
        """Run `patch_in_steps` to completion."""
        return run_to_completion(self.patch_in_steps(version))

    def weights(self, version: int) -> Mapping[WeightRef, Tensor]:
        """Return the edited weights of a version."""
        return self.patch(version).weights

    def patch_in_steps(self, version: int) -> Stepper[PatchSet]:
        """Return the patches of a version, attested. Raises DigestMismatch when other replicas hold other
        bytes."""
        while not self.advance_build(version):
            yield Progress(Phase.COMPOSE, 0, 1)
        return self.built_patch(version)

    def attest_version(self, version: int) -> str:
        """Return the digest of a version, which is built and attested first if it is not yet."""
        self.patch(version)
        return self._attested[version]

    def attested_digest(self, version: int) -> str:
        """Return the digest of a version that `advance_build` has built."""
        return self._attested[version]

    def built_patch(self, version: int) -> PatchSet:
        """Return the patches of a version that `advance_build` has built."""
        if version == 0:
            return BASE
        self._patches.move_to_end(version)
        return self._patches[version]

    def is_built(self, version: int) -> bool:
        """Return whether the patches of a version are cached and attested."""
        return version in self._attested and (version == 0 or version in self._patches)

    def advance_build(self, version: int) -> bool:
        """Run one step of building a version. Return True when it is built and attested."""
        if self.is_built(version):
            return True
        build = self._builds.setdefault(version, _VersionBuild(self._build(version)))
        started = time.monotonic()
        try:
            outcome = advance(build.stepper)
        except Exception:
            del self._builds[version]
            raise
        build.seconds += time.monotonic() - started
        if isinstance(outcome, Progress):
            return False
        del self._builds[version]
        metrics.VERSION_BUILD_SECONDS.observe(build.seconds)
        return True

    def _build(self, version: int) -> Stepper[None]:
        patch = yield from self._load_patch(version)
        if version not in self._attested:
            digest, dense_digest = yield from self._digest_patch(patch)
            if self._attest is not None:
                self._attest(version, digest)
            self._attested[version], self._dense_digests[version] = digest, dense_digest
        self._cache_patch(version, self._with_shared_weights(patch, self._dense_digests[version]))

    def _with_shared_weights(self, patch: PatchSet, dense_digest: str) -> PatchSet:
        """Return a patch with the weights that another version holds, if it has the same ones."""
        if patch.dense is None:
            return patch
        return replace(patch, dense=self._dense_by_digest.setdefault(dense_digest, patch.dense))

    def _load_patch(self, version: int) -> Stepper[PatchSet]:
        """Return the patches of a version, not attested, from the cache or composed."""
        if version not in self._patches:
            patch = yield from self._compose_version(version)
            self._cache_patch(version, patch)
            return patch
        return self._patches[version]

    def _compose_version(self, version: int) -> Stepper[PatchSet]:
        edits = self.ledger.active_at(version)
        patch = yield from self._derive_version(version, edits)
        if patch is not None:
            return patch
        active = yield from self._read_updates(edits)
        patch = yield from self.compose_patch_in_steps(a for group in active.values() for a in group)
        not_gated = {edit for edit, group in active.items() if None in map(gate_of, group)}
        self._active[version] = _ActiveEdits(frozenset(active), frozenset(not_gated))
        return patch

    def _derive_version(self, version: int, edits: Sequence[LedgerEdit]) -> Stepper[PatchSet | None]:
        """Return the patches of a version, made out of those of the cached version that is nearest to it: with the rows
        of the edits that it has more, and without those of the edits that it has fewer. Return None if there are many
        of them, or one that is not gated."""
        known = [v for v in self._active if v in self._patches]
        if not known:
            return None
        nearest = min(known, key=lambda v: abs(v - version))
        before, patch = self._active[nearest], self._patches[nearest]
        ids = frozenset(edit for edit, _ in edits)
        removed = before.edits - ids
        added = [(edit, body) for edit, body in edits if edit not in before.edits]
        if len(removed) + len(added) > MAX_DIFFERENCE or removed & before.not_gated:
            return None
        groups = yield from self._read_updates(added)
        updates = [u for group in groups.values() for u in group]
        if None in map(gate_of, updates):
            return None
        rows = yield from self._rows_by_place(updates)
        gated: dict[Place, GatedRows] = {p.place: p.rows for p in patch.gated}
        for place in gated.keys() | rows.keys():
            of_place = gated.get(place) or new_gated_rows(self._tables[place], [])
            gated[place] = of_place.changed(removed, rows.get(place, []))
        self._active[version] = _ActiveEdits(ids, before.not_gated)
        groups_left = (GatedPatch(group) for _, group in sorted(gated.items()) if group.rows)
        return replace(patch, gated=tuple(groups_left))

    def _cache_patch(self, version: int, patch: PatchSet) -> None:
        """Cache the patches of a version as the newest entry, which is never evicted itself."""
        if version == 0:
            return
        self._patches[version] = patch
        self._patches.move_to_end(version)
        while len(self._patches) > 1 and (
            len(self._patches) > self._max_cached_versions or self._cached_bytes() > self._max_weight_bytes
        ):
            evicted, _ = self._patches.popitem(last=False)
            self._active.pop(evicted, None)

    def _cached_bytes(self) -> int:
        """Return the memory of the cached weights, codebooks and records, and of all gated rows, each counted once."""
        shared = {id(s): s.nbytes for p in self._patches.values() for s in p.shared}
        shared |= {id(r): r.nbytes for p in self._patches.values() if (r := p.records) is not None}
        return sum(shared.values()) + sum(table.nbytes for table in self._tables.values())

    def digest(self, version: int) -> str:
        """Return the digest of a version without attesting it."""
        return run_to_completion(self._digest_patch(run_to_completion(self._load_patch(version))))[0]

    def _digest_patch(self, patch: PatchSet) -> Stepper[tuple[str, str]]:
        """Return the sha256 of the base model's fingerprint and the name and bytes of everything that differs from
        it, and the same of its weights alone."""
        known = None if patch.dense is None else self._dense_hashes.get(patch.dense)
        digest = hashlib.sha256(self.base.fingerprint.encode()) if known is None else known.copy()
        if known is None and patch.dense is not None:
            yield from self._hash_content(digest, PatchSet(patch.dense))
            self._dense_hashes[patch.dense] = digest.copy()
        dense_digest = digest.hexdigest()
        yield from self._hash_content(digest, replace(patch, dense=None))
        return digest.hexdigest(), dense_digest

    def _hash_content(self, digest: hashlib._Hash, patch: PatchSet) -> Stepper[None]:
        unchanged = {self.base.parameter_name(ref): tensor for ref, tensor in self._original.items()}
        hashed = 0
        for name, tensor in patch.digest_content(self.base):
            if name in unchanged and torch.equal(tensor, unchanged[name]):
                continue  # an edit that changed no byte is the base
            digest.update(name.encode())
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), DIGEST_BYTES):
                digest.update(data[start : start + DIGEST_BYTES])
                hashed += len(data[start : start + DIGEST_BYTES])
                if hashed >= DIGEST_BYTES:
                    hashed = 0
                    yield Progress(Phase.DIGEST, start, len(data))

    def remaining_capacity(self, version: int) -> dict[int, float]:
        """Run `remaining_capacity_in_steps` to completion."""
        return run_to_completion(self.remaining_capacity_in_steps(version))

    def remaining_capacity_in_steps(self, version: int) -> Stepper[dict[int, float]]:
        """Return the mean capacity of each edited layer at a version. Gated edits take none, and are not read."""
        edits = self.ledger.active_at(version)
        if version in self._active:
            edits = [(edit, body) for edit, body in edits if edit in self._active[version].not_gated]
        active = yield from self._read_updates(edits)
        return (yield from average_capacities_in_steps(a for group in active.values() for a in group))

    # use

    @contextmanager
    def use_patch(self, patch: PatchSet) -> Iterator[LoadedModel]:
        """Put patches in place inside the block. The base model is back afterwards, also after an error."""
        self.applied_patches += len(patch.patches)
        try:
            with patch.apply(self.base):
                yield self.base
        finally:
            self.applied_patches -= len(patch.patches)

    @contextmanager
    def use_patches(self, patches: Sequence[PatchSet]) -> Iterator[LoadedModel]:
        """Put the patches of each sequence of a batch in place inside the block. All have the same weights."""
        count = sum(len(p.patches) for p in patches)
        self.applied_patches += count
        try:
            with apply_to_batch(self.base, patches):
                yield self.base
        finally:
            self.applied_patches -= count

    def step_with_patch(self, patch: PatchSet, steps: Stepper[T]) -> Stepper[T]:
        """Run the same steps with these patches in place during each of them, and the base model in between."""
        return step_within(steps, lambda: self.use_patch(patch))


class _ComposedWeights:
    """The weights that were composed last and the updates that they are of. It keeps neither in memory."""

    def __init__(self, updates: Sequence[EditUpdate] = (), dense: DensePatch | None = None) -> None:
        self._updates = {id(u): weakref.ref(u) for u in updates}
        self._dense = (lambda: None) if dense is None else weakref.ref(dense)

    def find(self, updates: Sequence[EditUpdate]) -> DensePatch | None:
        """Return the weights if these are their updates, in any order, and some version still holds them."""
        known = (self._updates.get(id(u)) for u in updates)
        same = len(updates) == len(self._updates) and all(
            ref is not None and ref() is u for ref, u in zip(known, updates, strict=True)
        )
        return self._dense() if same else None


def _default_cache_bytes(free: int | None) -> int:
    return DEFAULT_CACHE_BYTES if free is None else int(free * CACHE_FRACTION)


def _factor_bytes(updates: Sequence[EditUpdate]) -> int:
    return sum(u.nbytes for u in updates)
