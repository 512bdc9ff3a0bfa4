"""The page of architectures: docs/architectures.md."""

from __future__ import annotations

import importlib.util

from tests.support.paths import ROOT


def test_architectures_page_is_current() -> None:
    """docs/architectures.md is what docs/architectures.py writes from the table and the tests of this code."""
    spec = importlib.util.spec_from_file_location("architectures_page", ROOT / "docs" / "architectures.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python docs/architectures.py"
