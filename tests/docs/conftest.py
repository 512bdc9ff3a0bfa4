"""A service that the examples speak to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shipped_service import running_service


@pytest.fixture(scope="module")
def url(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real service answers; each file of tests begins with an empty ledger."""
    with running_service(tmp_path_factory.mktemp("served")) as url:
        yield url
