"""A trained scope classifier with its origin: the artifact of a training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from service.errors import InvalidInput
from service.weights.scope_classifier import ScopeClassifier, read_scope_classifier

FORMAT = "palimpsest-scope-1"


@dataclass(frozen=True)
class TrainedScope:
    """A classifier, the model that it is for, and how it was trained and measured."""

    classifier: ScopeClassifier
    fingerprint: str  #: of the model
    trained_at: str  #: ISO 8601, UTC
    report: dict[str, Any]  #: the plan, the numbers of texts, and the figures on held-out subjects

    def description(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON."""
        return {"digest": self.classifier.digest, "trained_at": self.trained_at, **self.report}

    def serialize(self) -> bytes:
        """Return the artifact as a safetensors file."""
        description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "trained_at": self.trained_at,
            "report": json.dumps(self.report),
        }
        return save({n: t.contiguous() for n, t in self.classifier.tensors().items()}, description)


def deserialize_trained_scope(data: bytes) -> TrainedScope:
    """Return the artifact from the bytes of `TrainedScope.serialize`. Raise InvalidInput for other bytes."""
    try:
        length = int.from_bytes(data[:8], "little")
        described = json.loads(data[8 : 8 + length])["__metadata__"]
        if described["format"] != FORMAT:
            raise KeyError("format")
        return TrainedScope(
            read_scope_classifier(load(data)),
            described["fingerprint"],
            described["trained_at"],
            json.loads(described["report"]),
        )
    except (KeyError, ValueError, IndexError, SafetensorError):
        raise InvalidInput("the file is not a scope classifier: train one again.") from None
