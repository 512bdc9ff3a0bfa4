"""Whoever follows a link of a page arrives."""

from __future__ import annotations

import re

import pytest

from tests.support.page_blocks import BLOCK_PATTERN, ROOT, doc_pages, page_text

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([^"]+)">')


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(page: str) -> set[str]:
    text = BLOCK_PATTERN.sub("", page_text(page))
    return {slug(heading) for heading in HEADING.findall(text)} | set(ANCHOR.findall(page_text(page)))


@pytest.mark.parametrize("page", doc_pages())
def test_links_arrive(page: str) -> None:
    """Every link inside the repository leads to a file that is there, and to a heading of it where it names one."""
    for path, anchor in LINK.findall(BLOCK_PATTERN.sub("", page_text(page))):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{path}#{anchor}"


def test_slugs() -> None:
    """Anchors are made as GitHub makes them: `GET /edits/{id}` is get-editsid."""
    assert slug("`GET /edits/{id}`") == "get-editsid"
    assert slug("ES, PS, NS, S") == "es-ps-ns-s"
    assert slug("[The guard](guard.md) and more") == "the-guard-and-more"
