"""What turns the base model into a version: a set of patches, each of which is in place only within a step.

A patch never changes the bytes of the base model. It exchanges pointers to tensors or installs hooks inside a block and
takes them out at its end, so that an error leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from service.models.loading import LoadedModel, WeightRef


class Patch(Protocol):
    """One change of a model."""

    @property
    def nbytes(self) -> int:
        """The memory that the patch holds."""

    def apply(self, model: LoadedModel) -> AbstractContextManager[None]:
        """Put the patch in place inside the block."""

    def changed_tensors(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield what differs from the base model, by name, in one order: the content of the digest."""


@dataclass(frozen=True)
class DensePatch:
    """Edited weights, whole."""

    weights: Mapping[WeightRef, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.weights.values())

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
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

    def changed_tensors(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for ref, tensor in sorted(self.weights.items()):
            yield model.parameter_name(ref), tensor


@dataclass(frozen=True)
class PatchSet:
    """The patches of a version. Without any it is the base model."""

    patches: tuple[Patch, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.patches)

    @property
    def weights(self) -> Mapping[WeightRef, Tensor]:
        """The edited weights of the dense patches."""
        dense = (p.weights for p in self.patches if isinstance(p, DensePatch))
        return {ref: tensor for weights in dense for ref, tensor in weights.items()}

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        """Put all patches in place inside the block."""
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch.apply(model))
            yield

    def changed_tensors(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for patch in self.patches:
            yield from patch.changed_tensors(model)


BASE = PatchSet()


def weights_patch(weights: Mapping[WeightRef, Tensor]) -> PatchSet:
    """Return the patch of edited weights; the base model for none."""
    return PatchSet((DensePatch(weights),)) if weights else BASE
