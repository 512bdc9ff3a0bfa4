"""Links, paths and test names in the documentation point to something that exists."""

from __future__ import annotations

import re

import pytest

from tests.support.page_blocks import BLOCK_PATTERN, doc_pages, page_text
from tests.support.paths import ROOT

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([^"]+)">')
#: a path of this repository between backticks, or in a command
SOURCE_PATH = re.compile(
    r"`(?:python |make test PYTEST='[^']*)?((?:api|bench|cli|deploy|docs|examples|migrations|models|palimpsest|service|tests|training"
    r"|workers)/[\w./-]*)"
)
TEST_NAME = re.compile(r"\btest_\w+(?!\w*\.py)\b")
#: files that a command or a reader creates
GENERATED = (
    "models/almanac/state.pt",
    "service/methods/rome_identity.py",
    "tests/unit/service/methods/",
)
#: folders that paths in the pages are relative to; docs/mathematics.md and tests/README.md say so
BASES = (".", "tests/unit", "tests/unit/service", "tests/integration")


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(page: str) -> set[str]:
    text = BLOCK_PATTERN.sub("", page_text(page))
    return {slug(heading) for heading in HEADING.findall(text)} | set(ANCHOR.findall(page_text(page)))


@pytest.mark.parametrize("page", doc_pages())
def test_links_resolve(page: str) -> None:
    """Every relative link points to an existing file, and to an existing heading if it has an anchor."""
    for path, anchor in LINK.findall(BLOCK_PATTERN.sub("", page_text(page))):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{path}#{anchor}"


def test_slugs() -> None:
    """Anchors follow GitHub's rules: `GET /edits/{id}` is get-editsid."""
    assert slug("`GET /edits/{id}`") == "get-editsid"
    assert slug("ES, PS, NS, S") == "es-ps-ns-s"
    assert slug("[The guard](guard.md) and more") == "the-guard-and-more"


@pytest.mark.parametrize("page", [*doc_pages(), "tests/README.md"])
def test_paths_exist(page: str) -> None:
    """Every path of the repository that a page names between backticks exists."""
    missing = [
        path
        for path in SOURCE_PATH.findall(page_text(page))
        if path not in GENERATED and not any((ROOT / base / path).exists() for base in BASES)
    ]
    assert not missing


@pytest.fixture(scope="module")
def defined_tests() -> set[str]:
    """Return the names of all test functions and test modules."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    names = {file.stem for file in files}
    for file in files:
        names |= set(re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8")))
    return names


@pytest.mark.parametrize("page", [*doc_pages(), "tests/README.md"])
def test_named_tests_exist(page: str, defined_tests: set[str]) -> None:
    """Every test that a page names is defined."""
    assert set(TEST_NAME.findall(page_text(page))) <= defined_tests
