"""The code blocks of a page, each with what the page says of it: run it, this is its output, or why it is not run.

A comment in front of a block, invisible where the page is read, says what is to be done with it:

    <!-- not run: REASON -->    the block is only shown
    <!-- output -->             the block shows what the block before it printed
    <!-- setup: COMMANDS -->    what the next block needs and its reader has anyway, such as an id in a variable

`<!-- a fresh service -->` anywhere on a page asks for a ledger that begins with it, for pages that show version numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from tests.support.paths import ROOT

SHELL, PYTHON = ("sh", "bash"), ("python",)
#: what holds nothing to run, but has a form that it must have
FORMS = ("json", "yaml", "toml", "ini", "sql")
#: drawings and output
PLAIN = ("", "text")

FOUND = re.compile(
    r"<!--(?P<comment>.*?)-->|^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN, OUTPUT, SETUP = "not run:", "output", "setup:"
#: of a page that shows the numbers of a ledger that begins
FRESH = "<!-- a fresh service -->"


@dataclass(frozen=True)
class Block:
    """One block of a page. `told` is the comment directly in front of it, `setup` what is to be run before it."""

    page: str
    line: int
    language: str
    code: str
    told: str = ""
    setup: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        return self.told.removeprefix(NOT_RUN).strip() if self.told.startswith(NOT_RUN) else None

    @property
    def is_output(self) -> bool:
        return self.told == OUTPUT

    @property
    def runs(self) -> bool:
        return self.language in SHELL + PYTHON and self.reason is None and not self.is_output


def pages() -> list[str]:
    """Every page that a person may take a command from."""
    folders = ("", "docs", "docs/howto", "docs/decisions", "training", "examples", "palimpsest")
    found = [page for folder in folders for page in sorted((ROOT / folder).glob("*.md"))]
    found += sorted((ROOT / "models").glob("*/README.md"))
    return [str(page.relative_to(ROOT)) for page in found]


def blocks(text: str, page: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    told, setup, end = "", "", 0
    for found in FOUND.finditer(text):
        if text[end : found.start()].strip():  # a comment speaks of what directly follows it
            told = setup = ""
        end = found.end()
        if found["comment"] is not None:
            words = found["comment"].strip()
            if words.startswith(SETUP):
                setup += words.removeprefix(SETUP).strip() + "\n"
            else:
                told = words
            continue
        indent = re.compile(f"^{found['indent']}", re.MULTILINE)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found["language"], indent.sub("", found["code"]), told, setup)
        told = setup = ""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def read(page: str) -> list[Block]:
    return list(blocks(text_of(page), page))


def taken_up(page: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    """(a block that runs, the block that shows its output), in order."""
    for block, after in zip_longest(page, page[1:]):
        if block.runs:
            yield block, after if after is not None and after.is_output else None
