"""Edits drawn by chance, as they land: what they say matters less than that their keys and values are like found ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from service.engine.versioned_model import Replica
from service.models.loading import LoadedModel
from service.weights.composition import Association, Piece, pack

PROMPT = "Look at the {}"


def associations(
    model: LoadedModel, count: int, layers: Sequence[int], seed: int = 0, size: float = 1.0
) -> dict[str, list[Piece]]:
    """For each edit one association in every layer. Keys lie apart as those of different subjects do, with a common part."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    D, d = model.inner_width, model.width
    common, scales = draw(D), torch.rand(D, generator=generator) + 0.5
    found: dict[str, list[Piece]] = {}
    for number in range(count):
        edit = f"edit_{number:06}"
        keys = [draw(D) + 0.3 * common for _ in layers]
        found[edit] = [
            Association(edit, f"subject {number}", x, key, key / scales, size * draw(d))
            for x, key in zip(layers, keys, strict=True)
        ]
    return found


@dataclass
class Book:
    """A ledger in memory at whose version n the first n edits are active."""

    edits: dict[str, list[Piece]]
    attested: dict[int, str] = field(default_factory=dict)

    def head(self) -> int:
        return len(self.edits)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        told = {"prompt": PROMPT, "target_new": "is", "method": "rome", "strength": 1.0}
        return [(e, told | {"subject": self.edits[e][0].subject}) for e in list(self.edits)[:version]]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {e: pack(self.edits[e]) for e in edits}

    def attest(self, version: int, digest: str) -> None:
        self.attested[version] = digest


def replica_of(model: LoadedModel, count: int, layers: Sequence[int], size: float = 1.0) -> Replica:
    """A replica of a ledger with so many edits."""
    return Replica(model, Book(associations(model, count, layers, size=size)))
