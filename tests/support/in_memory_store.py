"""An artifact store in memory."""

from __future__ import annotations


class InMemoryStore(dict[str, bytes]):
    """Implements `service.kit.artifact_store.ArtifactStore`. Its items are the artifacts."""

    def put(self, name: str, data: bytes) -> None:
        self[name] = data
