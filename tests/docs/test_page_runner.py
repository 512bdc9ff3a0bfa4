"""What the pages are followed with: blocks are found with what is said of them, run in order, and what they print is compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_blocks import Block, parse_blocks, runnable_with_output
from tests.support.page_output import output_matches
from tests.support.page_sessions import BlockFailed, DocSession

PAGE = """
<!-- setup: WORD=hidden -->

```sh
echo $WORD
```

<!-- output -->
```text
hidden
```

Words between a comment and a block part them.

<!-- not run: it would end the machine -->
```sh
halt
```

  ```python
  x = 1
  ```
"""


def make_block(code: str, language: str = "sh", setup: str = "") -> Block:
    return Block("page.md", 1, language, code, setup=setup)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[DocSession]:
    with DocSession(tmp_path, port=8111) as session:
        yield session


def test_blocks_have_their_directives() -> None:
    """A comment speaks of the block that directly follows it; a block in a list loses the list's indent."""
    first, output, skipped, last = parse_blocks(PAGE, "page.md")
    assert (first.setup, first.runs, first.line) == ("WORD=hidden\n", True, 4)
    assert output.is_output and not output.runs
    assert skipped.reason == "it would end the machine" and not skipped.runs
    assert last.code == "x = 1\n" and last.runs
    assert list(runnable_with_output([first, output, skipped, last])) == [(first, output), (last, None)]


def test_a_comment_further_away_says_nothing() -> None:
    """Text between a comment and a block parts them: a block is never left out by accident."""
    [found] = parse_blocks("<!-- not run: no -->\nwords\n\n```sh\ntrue\n```\n", "page.md")
    assert found.runs


def test_a_shell_remembers(session: DocSession) -> None:
    """A page's shell blocks are one session: variables and folders stay; what its reader has anyway is set up unseen."""
    session.run(make_block("export A=$B\nmkdir -p deep && cd deep\n", setup="B=1\n"))
    assert session.run(make_block('echo "$A $(basename $PWD)"\n')) == "1 deep\n"


def test_an_interpreter_remembers(session: DocSession) -> None:
    """A page's Python blocks are one program."""
    session.run(make_block("x = 2\n", "python"))
    assert session.run(make_block("print(x + 1)\n", "python")) == "3\n"


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("false\ntrue\n", "sh"),
        ("false | cat\n", "sh"),
        ("echo $(exit 3) && nothing-of-this-name\n", "sh"),
        ("raise SystemExit(1)\n", "python"),
        ("1 / 0\n", "python"),
    ],
)
def test_a_command_that_fails_fails_the_page(session: DocSession, code: str, language: str) -> None:
    """Any failing command of a block, in a pipe too, fails; the page, the line and the block are named."""
    with pytest.raises(BlockFailed, match=r"page\.md:1 fails") as failed:
        session.run(make_block(code, language))
    assert code in str(failed.value)


def test_pages_are_written_for_the_default_port(session: DocSession) -> None:
    """The port of a page becomes the service's, and in what is printed becomes the page's again."""
    output = session.run(
        make_block(
            "python -c 'print(len(\"http://127.0.0.1:8000\"))'; echo http://127.0.0.1:8000; echo $PWD\n"
        )
    )
    assert output.splitlines()[:2] == ["21", "http://127.0.0.1:8000"]
    assert "127.0.0.1:8111" in (session.folder / ".block.sh").read_text()


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        ("a  b\n", "a b"),
        ("edit_… applied 0.997", "edit_01K applied 0.99"),
        ("from 1.25 s", "from 1.30 s"),
        ("first\n…\nlast", "first\nsecond\nthird\nlast"),
        ("made by …", "made by many hands"),
        ("…\nlast", "last"),
        ("─────", "──────────────"),
        ("a ·░▓█", "a ·▒▓▓"),
        ("██▌", "██▋"),
        ("███", "██▉"),
    ],
)
def test_what_is_the_same(shown: str, came: str) -> None:
    """Space, the length of rules, the last digits of numbers and what `…` stands for may differ."""
    assert output_matches(shown, came)


@pytest.mark.parametrize(
    ("shown", "came"),
    [
        ("Rome", "Paris"),
        ("0.99", "0.90"),
        ("p 0.9", "q 0.9"),
        ("version 1", "version 2"),
        ("first\n…\nlast", "first\nsecond"),
        ("one", "one\ntwo"),
        ("one two", "one"),
        ("one two …", "one"),
        ("edit_…", "trace_01"),
        ("·░▓█", "·█▓█"),
        ("·░", "·░░"),
        ("██▌", "█▌"),
    ],
)
def test_what_is_not(shown: str, came: str) -> None:
    """Another word, another whole number, a number further away, a line too many or too few."""
    assert not output_matches(shown, came)


def test_json_shows_a_part() -> None:
    """An answer that is shown as JSON has what is shown, and may have more; what is shown and not there is told."""
    came = '{"id": "edit_1", "p": 0.993, "n": 2.0, "items": [{"a": 1, "b": 2}, {"a": 3}]}'
    for shown in (
        '{"p": 0.99}',
        '{"id": "edit_…"}',
        '{"items": [{"a": 1}, {}]}',
        '{"items": [{"b": 2}, "…"]}',
        '{"n": "…"}',
        '{"n": 2}',
    ):
        assert output_matches(shown, came, "json"), shown
    for shown in (
        '{"p": 0.9}',
        '{"q": 1}',
        '{"items": [{"a": 1}]}',
        '{"n": true}',
        '{"n": 3}',
        '{"items": [{"a": 3}, "…"]}',
    ):
        assert not output_matches(shown, came, "json"), shown
