"""A resident model that can stand at any version, rebuilt from its untouched base bytes (design, section 2.1).

Edited tensors are put in place by exchanging pointers and taken out again after every step: between steps the model always
holds its base bytes, so whatever fails, nothing stays behind.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from service.kit import metrics
from service.kit.steps import Stepper, step_within
from service.kit.text import normalize_whitespace
from service.models.loading import LoadedModel, WeightRef
from service.weights.capacity import average_capacities
from service.weights.composition import apply_delta, compose
from service.weights.factors import EditUpdate, deserialize_updates

T = TypeVar("T")
WeightOverrides = Mapping[WeightRef, Tensor]  # edited tensors; empty is the base model
MAX_CACHED_VERSIONS = 8  # versions whose weights are kept at hand


class ReplicaLedger(Protocol):
    """What a replica reads of the ledger."""

    def head(self) -> int: ...

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]: ...

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]: ...


class EmptyLedger:
    """A ledger without entries, for work that composes edits by hand and leaves nothing behind."""

    def head(self) -> int:
        return 0

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return []

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {}


class VersionedModel:
    """One resident model and the ledger it follows.

    `attest` is called once for each version with the digest of its weights, before they are used; it raises
    DigestMismatch when other replicas hold other bytes. Without it versions are not attested.
    """

    def __init__(
        self,
        model: LoadedModel,
        ledger: ReplicaLedger,
        attest: Callable[[int, str], None] | None = None,
        *,
        max_cached_versions: int = MAX_CACHED_VERSIONS,
    ) -> None:
        self.base = model
        self.ledger = ledger
        self._attest = attest
        self._max_cached_versions = max_cached_versions
        self._weights: OrderedDict[int, WeightOverrides] = OrderedDict()
        self._attested: dict[int, str] = {}
        self._updates: dict[str, list[EditUpdate]] = {}
        self._parameters = {site: model.parameter(site) for site in model.editable_weights}
        self._original = {site: parameter.data for site, parameter in self._parameters.items()}

    def head(self) -> int:
        return self.ledger.head()

    def active_updates(self, version: int) -> dict[str, list[EditUpdate]]:
        """The pieces of every edit active at a version, by the edit's id. Each is read and unpacked once."""
        subjects = {
            edit: normalize_whitespace(str(body["subject"])) for edit, body in self.ledger.active_at(version)
        }
        if missing := [edit for edit in subjects if edit not in self._updates]:
            factors = self.ledger.factors_of(missing)
            self._updates |= {e: deserialize_updates(factors[e], e, subjects[e]) for e in missing}
        return {edit: self._updates[edit] for edit in subjects}

    def compose_weights(self, updates: Iterable[EditUpdate]) -> WeightOverrides:
        """The edited weights for a set of pieces, from the base bytes."""
        conv1d = self.base.architecture.conv1d
        return {
            site: apply_delta(self._original[site], change, conv1d)
            for site, change in compose(updates).items()
        }

    def weights(self, version: int) -> WeightOverrides:
        """The edited weights of a version, vouched for before they are first given out."""
        self.attest_version(version)
        return self._weights_of(version)

    def attest_version(self, version: int) -> str:
        """The digest of a version, attested to once. Raises Disagrees when other replicas hold other bytes."""
        if version not in self._attested:
            digest = self.digest(version)
            if self._attest is not None:
                self._attest(version, digest)
            self._attested[version] = digest
        return self._attested[version]

    def _weights_of(self, version: int) -> WeightOverrides:
        """The edited weights of a version; the newest few are kept."""
        if version == 0:
            return {}
        if version not in self._weights:
            with metrics.VERSION_BUILD_SECONDS.time():
                active = self.active_updates(version)
                self._weights[version] = self.compose_weights(a for group in active.values() for a in group)
            while len(self._weights) > self._max_cached_versions:
                self._weights.popitem(last=False)
        self._weights.move_to_end(version)
        return self._weights[version]

    def remaining_capacity(self, version: int) -> dict[int, float]:
        """What is left of an average key at a version, by edited layer."""
        return average_capacities(a for group in self.active_updates(version).values() for a in group)

    @contextmanager
    def use_weights(self, weights: WeightOverrides) -> Iterator[LoadedModel]:
        """Put edited tensors in place; the base tensors are back afterwards, whatever happens."""
        try:
            for site, tensor in weights.items():
                self._parameters[site].data = tensor
            yield self.base
        finally:
            for site in weights:
                self._parameters[site].data = self._original[site]

    def step_with_weights(self, weights: WeightOverrides, steps: Stepper[T]) -> Stepper[T]:
        """Run a generator with these weights in place during each of its steps, and the base in between."""
        return step_within(steps, lambda: self.use_weights(weights))

    def digest(self, version: int) -> str:
        """sha256 over the bytes of every edited weight at a version and over the base model's fingerprint."""
        digest = hashlib.sha256(self.base.fingerprint.encode())
        for site, tensor in sorted(self._weights_of(version).items()):
            if torch.equal(tensor, self._original[site]):
                continue  # an edit that changed no byte is the base
            digest.update(self.base.parameter_name(site).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
