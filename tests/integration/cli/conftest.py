"""The command line in a terminal of a fixed width."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Format output for 160 columns."""
    monkeypatch.setenv("COLUMNS", "160")
