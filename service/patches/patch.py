"""What turns the base model into a version: a set of patches, which is in place only within a step.

A patch never changes the bytes of the base model. It exchanges pointers to tensors or installs hooks inside a block and
takes them out at its end, so that an error leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from service.models.loading import LoadedModel, WeightRef
from service.patches.codebook_patch import CodebookPatch
from service.patches.gated_patch import GatedPatch, apply_to_sequences
from service.patches.record_patch import RecordPatch


@dataclass(frozen=True, eq=False)
class DensePatch:
    """Edited weights, whole. Versions with the same weights share one patch, so it is compared by identity."""

    weights: Mapping[WeightRef, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.weights.values())

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        """Put the weights in place inside the block."""
        replaced: list[tuple[WeightRef, Tensor]] = []
        try:
            for ref, tensor in self.weights.items():
                parameter = model.parameter(ref)
                replaced.append((ref, parameter.data))
                parameter.data = tensor
            yield
        finally:
            for ref, original in replaced:
                model.parameter(ref).data = original

    def digest_content(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for ref, tensor in sorted(self.weights.items()):
            yield model.parameter_name(ref), tensor


Patch = DensePatch | GatedPatch | CodebookPatch | RecordPatch


@dataclass(frozen=True)
class PatchSet:
    """The patches of a version, in the order in which they act. Without any it is the base model.

    Sequences of versions with the same `shared` patches can decode in one batch: see `apply_to_batch`.
    """

    dense: DensePatch | None = None
    gated: tuple[GatedPatch, ...] = ()
    codebooks: tuple[CodebookPatch, ...] = ()
    records: RecordPatch | None = None

    @property
    def patches(self) -> tuple[Patch, ...]:
        dense, records = ([p] if p is not None else [] for p in (self.dense, self.records))
        return (*dense, *self.gated, *self.codebooks, *records)

    @property
    def shared(self) -> tuple[DensePatch | CodebookPatch, ...]:
        """The patches that act on every sequence of a batch: all but gated rows, of which each sequence has its own,
        and records, by which a sequence was routed before it joined a batch."""
        return (*([self.dense] if self.dense is not None else []), *self.codebooks)

    @property
    def gated_edits(self) -> frozenset[str]:
        """The ids of the gated edits."""
        return frozenset(row.edit for p in self.gated for row in p.rows.rows)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.patches)

    @property
    def weights(self) -> Mapping[WeightRef, Tensor]:
        """The edited weights."""
        return {} if self.dense is None else self.dense.weights

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        """Put all patches in place inside the block."""
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch.apply(model))
            yield

    def digest_content(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield what determines the outputs beside the base model, by name, in one order: edited weights, and the
        digests of gated rows."""
        for patch in self.patches:
            yield from patch.digest_content(model)


BASE = PatchSet()


@contextmanager
def apply_to_batch(model: LoadedModel, patch_sets: Sequence[PatchSet]) -> Iterator[None]:
    """Put the patches of a batch in place: one set for each sequence, all with the same shared patches. A layer with
    gated rows has one hook, in which each sequence has the rows of its own version alone."""
    (_,) = {p.shared for p in patch_sets}  # raises if they differ
    first = patch_sets[0]
    by_place = [{patch.place: patch for patch in p.gated} for p in patch_sets]
    with ExitStack() as stack:
        if first.dense is not None:
            stack.enter_context(first.dense.apply(model))
        for place in sorted({place for places in by_place for place in places}):
            stack.enter_context(apply_to_sequences(model, [places.get(place) for places in by_place]))
        for codebook in first.codebooks:
            stack.enter_context(codebook.apply(model))
        yield


def weights_patch(weights: Mapping[WeightRef, Tensor]) -> PatchSet:
    """Return the patch of edited weights; the base model for none."""
    return PatchSet(DensePatch(weights)) if weights else BASE
