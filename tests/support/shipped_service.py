"""One running service on the shipped GPT, for tests of what speaks to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import EmbeddedService


@contextmanager
def running_service(data: Path) -> Iterator[str]:
    """The address of `palimpsest serve` on a fresh data folder."""
    service = EmbeddedService(data)
    try:
        yield str(service.http.base_url).rstrip("/")
    finally:
        service.stop()
