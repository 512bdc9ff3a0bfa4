"""A running service with the shipped GPT, for tests of clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import EmbeddedService


@contextmanager
def running_service(data: Path) -> Iterator[str]:
    """Run `palimpsest serve` with a new data folder. Yield its address."""
    service = EmbeddedService(data)
    try:
        yield str(service.http.base_url).rstrip("/")
    finally:
        service.stop()
