"""The gated associations of one layer as a patch: a hook that adds their change to the down-projection's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from service.gating.gated_rows import GatedRows
from service.models.hooks import add_change_by_input
from service.models.loading import LoadedModel


@dataclass(frozen=True)
class GatedPatch:
    """The rows of one layer and gate space, on the device of the layer."""

    rows: GatedRows

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        with add_change_by_input(model.down_proj(self.rows.layer), self.rows.change):
            yield

    def changed_tensors(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.rows.tensors().items():
            yield f"gated.{self.rows.layer}.{self.rows.space.digest}.{name}", tensor
