"""The service that the examples call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shipped_service import running_service, statistics_folder

__all__ = ["statistics_folder"]


@pytest.fixture(scope="module")
def url(statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a real service; each test file starts with an empty ledger."""
    with running_service(tmp_path_factory.mktemp("served"), statistics_folder) as url:
        yield url
