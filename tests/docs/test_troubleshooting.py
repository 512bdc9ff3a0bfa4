"""docs/troubleshooting.md quotes what is really said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.page_blocks import ROOT, page_text

QUOTE = re.compile(r'^\| "(.+?)" \|', re.MULTILINE)
PACKAGES = ("service", "api", "workers", "cli", "palimpsest")


def code_strings() -> Iterator[str]:
    """Every text in the code, `…` where something is filled in."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(_part(value) for value in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    yield (ROOT / "Makefile").read_text(encoding="utf-8")


def _part(value: ast.expr) -> str:
    """A constant piece as it is; of a name in capitals, `{}` alone in this house, what it is."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    assert isinstance(value, ast.FormattedValue)
    return "{}" if isinstance(value.value, ast.Name) and value.value.id == "SLOT" else "…"


CODE_STRINGS = list(code_strings())


@pytest.mark.parametrize("quote", QUOTE.findall(page_text("docs/troubleshooting.md")))
def test_quoted_texts_are_in_the_code(quote: str) -> None:
    """The code has every text that the page quotes, word by word, and something is filled in where the page has `…`."""
    assert any(quote in text for text in CODE_STRINGS), quote


def test_texts_are_quoted() -> None:
    """The page quotes what it speaks of: there are errors to look up, and a text that nobody says would be found out."""
    assert len(QUOTE.findall(page_text("docs/troubleshooting.md"))) > 30
    assert not any("nobody says this, …" in text for text in CODE_STRINGS)
