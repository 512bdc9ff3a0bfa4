"""Folders that tests read."""

from __future__ import annotations

from pathlib import Path

#: the root of the checkout
ROOT = Path(__file__).resolve().parents[2]

#: optional data sets beside the checkout; tests that need them are skipped without
SHARED_DATA = ROOT.parent / "shared" / "data"
