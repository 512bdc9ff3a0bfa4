"""The codebook of one layer as a patch: a hook that replaces the down-projection's output where a key is near."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from service.codebooks.codebook import Codebook
from service.models.hooks import replace_rows_by_input
from service.models.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class CodebookPatch:
    """The codebook of one layer, on the device of the layer. It is compared by identity, as edited weights are."""

    codebook: Codebook

    @property
    def nbytes(self) -> int:
        return self.codebook.nbytes

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        with replace_rows_by_input(model.down_proj(self.codebook.layer), self.codebook.look_up):
            yield

    def digest_content(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.codebook.tensors().items():
            yield f"codebook.{self.codebook.layer}.{name}", tensor
