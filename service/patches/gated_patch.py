"""Gated associations of one layer as a patch: a hook that adds their changes to the down-projection's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from service.gating.gated_rows import GatedRows, change_of_batch
from service.models.hooks import add_changes_by_input
from service.models.loading import LoadedModel


@dataclass(frozen=True)
class GatedPatch:
    """The rows of one layer and gate space."""

    rows: GatedRows

    @property
    def place(self) -> tuple[int, str]:
        """The layer and the space, which one hook can serve for several versions."""
        return self.rows.layer, self.rows.table.space.digest

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def apply(self, model: LoadedModel) -> AbstractContextManager[None]:
        return apply_to_sequences(model, [self])

    def digest_content(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        layer, space = self.place
        yield f"gated.{layer}.{space}.rows", self.rows.digests()


@contextmanager
def apply_to_sequences(model: LoadedModel, patches: Sequence[GatedPatch | None]) -> Iterator[None]:
    """Put the patches of one layer and space in place: one for each sequence of a batch, or a single one for all; None
    for a sequence without one."""
    versions = [None if p is None else p.rows for p in patches]
    layer = next(rows.layer for rows in versions if rows is not None)

    def changes(keys: Tensor) -> tuple[Tensor, Tensor] | None:
        found = change_of_batch(keys, versions)
        return None if found is None else (found.tokens, found.changes)

    with add_changes_by_input(model.down_proj(layer), changes):
        yield
