"""Named artifacts of a long computation, so that an interrupted one resumes instead of starting from nothing."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from service.kit.files import write_atomically
from service.kit.steps import Stepper


class ArtifactStore(Protocol):
    """A mapping from names to bytes."""

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None: ...


class DirectoryStore:
    """An artifact store with one file for each name. Files are written atomically."""

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
    """Return an artifact parsed as JSON, or None if it does not exist."""
    data = store.get(name)
    return None if data is None else json.loads(data)


def put_json(store: ArtifactStore, name: str, value: Any) -> None:
    """Store a value as JSON."""
    store.put(name, json.dumps(value).encode())


def inputs_digest(inputs: Any) -> str:
    """Return the SHA-256 of JSON-able inputs as 64 hexadecimal digits. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def content_addressed_name(kind: str, inputs: Any) -> str:
    """Return the name of an artifact whose value is a function of `inputs`: the kind and 96 bits of their digest."""
    return f"{kind}-{inputs_digest(inputs)[:24]}.json"


def load_or_compute(store: ArtifactStore, name: str, stepper: Stepper[Any]) -> Stepper[Any]:
    """Return the stored JSON value of a name. If there is none, run the stepper, store its result, and return that.

    The result goes through JSON in both cases, so that a resumed computation sees the same values as an uninterrupted
    one.
    """
    with closing(stepper):
        if store.get(name) is None:
            put_json(store, name, (yield from stepper))
        return get_json(store, name)
