"""The page runner: it parses blocks and directives, executes blocks in order, and compares their output."""

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

Text between a comment and a block separates them.

<!-- not run: it would stop the machine -->
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
    """A directive applies to the block directly after it; a block in a list loses the list's indent."""
    first, output, skipped, last = parse_blocks(PAGE, "page.md")
    assert (first.setup, first.runs, first.line) == ("WORD=hidden\n", True, 4)
    assert output.is_output and not output.runs
    assert skipped.reason == "it would stop the machine" and not skipped.runs
    assert last.code == "x = 1\n" and last.runs
    assert list(runnable_with_output([first, output, skipped, last])) == [(first, output), (last, None)]


def test_directive_needs_to_be_adjacent() -> None:
    """Text between a directive and a block separates them, so no block is skipped by accident."""
    [block] = parse_blocks("<!-- not run: no -->\nwords\n\n```sh\ntrue\n```\n", "page.md")
    assert block.runs


def test_shell_blocks_share_a_session(session: DocSession) -> None:
    """Variables and the working directory persist between shell blocks; setup commands run before a block."""
    session.run(make_block("export A=$B\nmkdir -p deep && cd deep\n", setup="B=1\n"))
    assert session.run(make_block('echo "$A $(basename $PWD)"\n')) == "1 deep\n"


def test_python_blocks_share_a_session(session: DocSession) -> None:
    """Variables persist between Python blocks."""
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
def test_failing_command_fails_the_page(session: DocSession, code: str, language: str) -> None:
    """A failing command, also inside a pipe, raises an error with the page, the line and the block."""
    with pytest.raises(BlockFailed, match=r"page\.md:1 fails") as failed:
        session.run(make_block(code, language))
    assert code in str(failed.value)


def test_default_port_is_replaced(session: DocSession) -> None:
    """The default port in a block becomes the service's port, and the default again in its output."""
    output = session.run(
        make_block(
            "python -c 'print(len(\"http://127.0.0.1:8000\"))'; echo http://127.0.0.1:8000; echo $PWD\n"
        )
    )
    assert output.splitlines()[:2] == ["21", "http://127.0.0.1:8000"]
    assert "127.0.0.1:8111" in (session.folder / ".block.sh").read_text()


@pytest.mark.parametrize(
    ("shown", "actual"),
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
def test_equal_outputs(shown: str, actual: str) -> None:
    """White space, the length of rules, the last digits of numbers and text in place of `…` may differ."""
    assert output_matches(shown, actual)


@pytest.mark.parametrize(
    ("shown", "actual"),
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
def test_different_outputs(shown: str, actual: str) -> None:
    """Another word, another integer, a number further away, and an extra or missing line are differences."""
    assert not output_matches(shown, actual)


def test_json_output_may_be_partial() -> None:
    """An answer must have every shown JSON value, and may have more."""
    actual = '{"id": "edit_1", "p": 0.993, "n": 2.0, "items": [{"a": 1, "b": 2}, {"a": 3}]}'
    for shown in (
        '{"p": 0.99}',
        '{"id": "edit_…"}',
        '{"items": [{"a": 1}, {}]}',
        '{"items": [{"b": 2}, "…"]}',
        '{"n": "…"}',
        '{"n": 2}',
    ):
        assert output_matches(shown, actual, "json"), shown
    for shown in (
        '{"p": 0.9}',
        '{"q": 1}',
        '{"items": [{"a": 1}]}',
        '{"n": true}',
        '{"n": 3}',
        '{"items": [{"a": 3}, "…"]}',
    ):
        assert not output_matches(shown, actual, "json"), shown


def test_progress_is_no_part_of_the_output(session: DocSession) -> None:
    """Lines of progress, which a slow machine prints, are not part of the output of a block."""
    code = """from cli import terminal
terminal.LINE_INTERVAL = 0.0
with terminal.progress_bar() as display:
    display.update("edits", 1, 2)
print("done")
"""
    assert session.run(make_block(code, "python")) == "done\n"
