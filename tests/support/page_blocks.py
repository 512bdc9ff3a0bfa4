"""The code blocks of a page, each with the directive before it.

A directive is an HTML comment directly before a block:

    <!-- not run: REASON -->    the block is only shown
    <!-- output -->             the block shows the output of the block before it
    <!-- setup: COMMANDS -->    commands that run before the block, such as setting an id in a variable

`<!-- a fresh service -->` anywhere on a page requests an empty ledger, for pages that show version numbers.
`<!-- a fresh service with quick edits -->` also requests a quicker recipe, for pages that show no figures of an edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from tests.support.paths import ROOT

SHELL_LANGUAGES, PYTHON_LANGUAGES = ("sh", "bash"), ("python",)
#: languages that are parsed and not run
DATA_LANGUAGES = ("json", "yaml", "toml", "ini", "sql")
#: drawings and output
PLAIN_LANGUAGES = ("", "text")

BLOCK_PATTERN = re.compile(
    r"<!--(?P<comment>.*?)-->|^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN, OUTPUT, SETUP = "not run:", "output", "setup:"
#: the page whose commands tests/docs/test_examples.py runs, and whose output it checks
EXAMPLES_PAGE = "examples/README.md"
#: mark of a page whose output assumes an empty ledger
FRESH_SERVICE = "<!-- a fresh service -->"
#: mark of a page whose output also holds for edits of fewer steps
QUICK_EDITS = "<!-- a fresh service with quick edits -->"


@dataclass(frozen=True)
class Block:
    """One block of a page. `directive` is the comment before it, `setup` the code to run before it."""

    page: str
    line: int
    language: str
    code: str
    directive: str = ""
    setup: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Return why the block is not run; None if it is run."""
        return self.directive.removeprefix(NOT_RUN).strip() if self.directive.startswith(NOT_RUN) else None

    @property
    def is_output(self) -> bool:
        return self.directive == OUTPUT

    @property
    def runs(self) -> bool:
        return (
            self.language in SHELL_LANGUAGES + PYTHON_LANGUAGES and self.reason is None and not self.is_output
        )


def doc_pages() -> list[str]:
    """Return every page with commands."""
    folders = (
        "",
        "docs",
        "docs/howto",
        "docs/decisions",
        "docs/contributing",
        "training",
        "examples",
        "palimpsest",
    )
    paths = [page for folder in folders for page in sorted((ROOT / folder).glob("*.md"))]
    paths += sorted((ROOT / "models").glob("*/README.md"))
    return [str(page.relative_to(ROOT)) for page in paths]


def parse_blocks(text: str, page: str) -> Iterator[Block]:
    """Return the blocks of a page in order."""
    directive, setup, end = "", "", 0
    for match in BLOCK_PATTERN.finditer(text):
        if text[end : match.start()].strip():  # a comment applies to the block directly after it
            directive = setup = ""
        end = match.end()
        if match["comment"] is not None:
            words = match["comment"].strip()
            if words.startswith(SETUP):
                setup += words.removeprefix(SETUP).strip() + "\n"
            else:
                directive = words
            continue
        indent = re.compile(f"^{match['indent']}", re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], indent.sub("", match["code"]), directive, setup)
        directive = setup = ""


def page_text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def read_blocks(page: str) -> list[Block]:
    return list(parse_blocks(page_text(page), page))


def runnable_with_output(page: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    """Return pairs of a block that runs and the block with its output, in order."""
    for block, after in zip_longest(page, page[1:]):
        if block.runs:
            yield block, after if after is not None and after.is_output else None
