"""docs/troubleshooting.md quotes texts that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.page_blocks import page_text
from tests.support.paths import ROOT

QUOTE = re.compile(r'^\| "(.+?)" \|', re.MULTILINE)
PACKAGES = ("service", "api", "workers", "cli", "palimpsest")


def code_strings() -> Iterator[str]:
    """Yield every string literal of the code, with `…` for each interpolated value."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(_part(value) for value in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    yield (ROOT / "Makefile").read_text(encoding="utf-8")


def _part(value: ast.expr) -> str:
    """Return a constant part unchanged, the value of the constant `PLACEHOLDER`, and `…` for anything else."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    assert isinstance(value, ast.FormattedValue)
    return "{}" if isinstance(value.value, ast.Name) and value.value.id == "PLACEHOLDER" else "…"


CODE_STRINGS = list(code_strings())


@pytest.mark.parametrize("quote", QUOTE.findall(page_text("docs/troubleshooting.md")))
def test_quoted_texts_are_in_the_code(quote: str) -> None:
    """The code has every quoted text verbatim, with an interpolated value wherever the page has `…`."""
    assert any(quote in text for text in CODE_STRINGS), quote


def test_quotes_are_found() -> None:
    """The page quotes more than 30 texts, and a text that the code does not have is detected."""
    assert len(QUOTE.findall(page_text("docs/troubleshooting.md"))) > 30
    assert not any("no code has this text, …" in text for text in CODE_STRINGS)
