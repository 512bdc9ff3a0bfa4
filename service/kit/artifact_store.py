"""Named artifacts of a long computation, so that an interrupted computation can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from service.kit.files import write_atomically


class ArtifactStore(Protocol):
    """Bytes by name."""

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None: ...


class DirectoryStore:
    """An artifact store with a file for each name. Files are written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, data)


def get_json(store: ArtifactStore, name: str) -> Any:
    """Return an artifact parsed as JSON, or None when it does not exist."""
    data = store.get(name)
    return None if data is None else json.loads(data)


def put_json(store: ArtifactStore, name: str, value: Any) -> None:
    """Store a value as JSON."""
    store.put(name, json.dumps(value).encode())
