"""Random edits with keys and values distributed like those of computed edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from service.engine.versioned_model import VersionedModel
from service.models.loading import LoadedModel
from service.weights.factors import Association, EditUpdate, serialize_updates

PROMPT = "Look at the {}"


def random_associations(
    model: LoadedModel, count: int, layers: Sequence[int], seed: int = 0, size: float = 1.0
) -> dict[str, list[Association]]:
    """Return one association per edit and layer. Keys of edits differ as those of different subjects, with a common
    part."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    D, d = model.intermediate_size, model.hidden_size
    common, scales = draw(D), torch.rand(D, generator=generator) + 0.5
    updates_by_edit: dict[str, list[Association]] = {}
    for number in range(count):
        edit = f"edit_{number:06}"
        keys = [draw(D) + 0.3 * common for _ in layers]
        updates_by_edit[edit] = [
            Association(edit, f"subject {number}", x, key, key / scales, size * draw(d))
            for x, key in zip(layers, keys, strict=True)
        ]
    return updates_by_edit


@dataclass
class FakeLedger:
    """A ledger in memory. Version n has the first n edits."""

    edits: Mapping[str, Sequence[EditUpdate]]
    attested: dict[int, str] = field(default_factory=dict)

    def head(self) -> int:
        return len(self.edits)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        body = {"prompt": PROMPT, "target_new": "is", "method": "rome", "strength": 1.0}
        return [(e, body | {"subject": self.edits[e][0].subject}) for e in list(self.edits)[:version]]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {e: serialize_updates(self.edits[e]) for e in edits}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)

    def attest(self, version: int, digest: str) -> None:
        self.attested[version] = digest


def replica_with_random_edits(
    model: LoadedModel, count: int, layers: Sequence[int], size: float = 1.0
) -> VersionedModel:
    """Return a versioned model on a ledger with `count` edits."""
    return VersionedModel(model, FakeLedger(random_associations(model, count, layers, size=size)))
