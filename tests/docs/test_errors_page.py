"""The page of error codes: docs/errors.md."""

from __future__ import annotations

import importlib.util

from tests.support.paths import ROOT


def test_errors_page_is_current() -> None:
    """docs/errors.md is what docs/errors.py writes from the error classes of this code."""
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "docs" / "errors.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python docs/errors.py"
