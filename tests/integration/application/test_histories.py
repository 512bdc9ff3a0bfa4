"""Guarantee 5 over random histories: every version of a ledger builds, and reverting everything gives the base bytes.

`python bench/histories.py` runs 1,000 of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import wirings
from tests.support.histories import HISTORY_MODEL, History
from tests.support.tiny_models import tiny

OPERATIONS = 12


@pytest.mark.parametrize("seed", range(8))
def test_every_version_of_a_random_history_builds(tmp_path: Path, seed: int) -> None:
    """Edits, imports of hostile tensors, supersessions and reverts in random order lead to versions that build and are
    finite only. No edit ends in an internal error. After all reverts the weights have the bytes of the base model."""
    check_history(History(tmp_path, tiny(**HISTORY_MODEL), seed))


def test_every_version_builds_on_the_production_wiring(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same holds with PostgreSQL and Redis."""
    stores = wirings.production_settings(request)
    check_history(History(tmp_path, tiny(**HISTORY_MODEL), 100, **stores))


def check_history(history: History) -> None:
    """Run a history to its end."""
    try:
        history.run(OPERATIONS)
        assert history.outcomes["applied"] and history.internal_errors == []
    finally:
        history.close()
