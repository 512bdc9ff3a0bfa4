"""Folders that tests read from."""

from __future__ import annotations

from pathlib import Path

#: the root of the checkout
ROOT = Path(__file__).resolve().parents[2]

#: data sets that a development machine may have beside the checkout; tests that need them skip visibly without
SHARED_DATA = ROOT.parent / "shared" / "data"
