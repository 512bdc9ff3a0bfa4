"""Prose in the repository: the width of lines, and references to documents outside the repository."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MAX_WIDTH = 120
GENERATED = ROOT / "docs" / "reference.md"
PRAGMA = re.compile(r"# (fmt|type|noqa|pragma)\b|# noqa")
#: "methods" followed by a section, "design" followed by a section: documents that are not in the repository
OUTSIDE_DOCUMENT = re.compile(
    r"\bmethods,? [A-H](\.\d+)*\b(?!\^)"
    r"|\bdesign,? section\b|\bsection \d+(\.\d+)? of the design\b"
    r"|\b(methods|design|redesign|style)\.md\b|\bshared/(design|redesign|methods|style)\b"
)


def repository_files(*suffixes: str) -> list[Path]:
    """Return the tracked and new files with these suffixes."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(suffixes)]
    return [file for file in files if file.is_file()]


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line outside code blocks, tables, HTML tags and link targets."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        opened = re.match(r"\s*(```+|~~~+)", line)
        if opened and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opened[1]
        elif not fence and not line.lstrip().startswith(("|", "<", "[")):
            yield number, line


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line of a docstring and each line with a comment."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            for number in range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1):
                yield number, lines[number - 1]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not PRAGMA.search(token.string):
            yield token.start[0], lines[token.start[0] - 1]


def without_urls(line: str) -> str:
    return re.sub(r"https?://\S+|\]\([^)]*\)", "", line)


def test_lines_of_prose_are_at_most_120_characters() -> None:
    """In Markdown, docstrings and comments no line is wider than 120 characters; tables, URLs and code are exempt."""
    wide = []
    for file in repository_files(".md", ".py"):
        if file == GENERATED:
            continue
        text = file.read_text(encoding="utf-8")
        if max(map(len, text.splitlines()), default=0) <= MAX_WIDTH:  # parsing takes long
            continue
        prose = markdown_prose(text) if file.suffix == ".md" else python_prose(text)
        wide += [
            f"{file.relative_to(ROOT)}:{number}"
            for number, line in prose
            if len(without_urls(line)) > MAX_WIDTH
        ]
    assert wide == []


def test_references_are_to_documents_of_the_repository() -> None:
    """No comment or document cites a section of a document that is not in the repository."""
    found = []
    for file in repository_files(".py", ".md", ".js", ".toml", ".yml", "Dockerfile", "Makefile"):
        if file == Path(__file__).resolve():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if OUTSIDE_DOCUMENT.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    "line", ["as published (methods A.6)", "methods G", "see the design, section 2.6", "in shared/design.md"]
)
def test_references_to_outside_documents_are_found(line: str) -> None:
    """The pattern matches references to documents outside the repository."""
    assert OUTSIDE_DOCUMENT.search(line)
