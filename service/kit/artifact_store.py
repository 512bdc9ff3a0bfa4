"""What a long computation keeps by name as it goes, so that it need not begin from nothing when it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from service.kit.ids import new_id


class ArtifactStore(Protocol):
    """Bytes by name."""

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None: ...


class DirectoryStore:
    """A file for each name. A file is there whole or not at all, whatever happens while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"{name}.{new_id('part')}"
        temporary.write_bytes(data)
        temporary.replace(self.path / name)


def get_json(store: ArtifactStore, name: str) -> Any:
    """What was kept as JSON; None where nothing was."""
    data = store.get(name)
    return None if data is None else json.loads(data)


def put_json(store: ArtifactStore, name: str, value: Any) -> None:
    store.put(name, json.dumps(value).encode())
