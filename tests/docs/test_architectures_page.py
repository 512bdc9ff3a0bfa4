"""The page of architectures: docs/architectures.md."""

from __future__ import annotations

from tests.support.generated_pages import load_page_program


def test_architectures_page_is_current() -> None:
    """docs/architectures.md is what docs/architectures.py writes from the table and the tests of this code."""
    page = load_page_program("architectures")
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python docs/architectures.py"
