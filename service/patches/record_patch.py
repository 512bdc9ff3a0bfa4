"""The statement records of a version as a patch: a router of prompts, in place while prompts become token sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from service.models.loading import LoadedModel
from service.records.record_router import RecordRouter
from service.weights.factors import serialize_updates


@dataclass(frozen=True, eq=False)
class RecordPatch:
    """The records of a version. They change no output: only what is read before a prompt."""

    router: RecordRouter

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.router.records)

    @contextmanager
    def apply(self, model: LoadedModel) -> Iterator[None]:
        before, model.routing.router = model.routing.router, self.router
        try:
            yield
        finally:
            model.routing.router = before

    def digest_content(self, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
        for number, record in enumerate(self.router.records):
            digest = hashlib.sha256(serialize_updates([record])).digest()
            yield f"record.{number}", torch.frombuffer(bytearray(digest), dtype=torch.uint8)
