"""The page of error codes: docs/errors.md."""

from __future__ import annotations

from tests.support.generated_pages import load_page_program


def test_errors_page_is_current() -> None:
    """docs/errors.md is what docs/errors.py writes from the error classes of this code."""
    page = load_page_program("errors")
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python docs/errors.py"
