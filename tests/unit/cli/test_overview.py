"""The overview that `palimpsest` prints without a command: cli.overview."""

from __future__ import annotations

import argparse
import subprocess
import sys
import unicodedata

import pytest

from cli.entry import main
from cli.main import COMMANDS, build_parser
from cli.overview import OVERVIEW, overview

Captured = pytest.CaptureFixture[str]


def test_every_command_has_its_line() -> None:
    """The overview lists each command of the parser exactly once."""
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    named = [name for group in OVERVIEW.values() for name in group]
    assert sorted(named) == sorted(commands)


def test_it_is_one_screen_of_plain_text() -> None:
    """The overview has at most 40 lines of 80 columns and no control characters."""
    lines = overview().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert not [c for c in overview() if unicodedata.category(c) == "Cc" and c != "\n"]


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_no_command_prints_the_overview(capsys: Captured, words: list[str]) -> None:
    """No command, `help` and `--help` print the overview and exit with 0."""
    assert main(words) == 0
    assert capsys.readouterr() == (overview(), "")


def test_help_of_a_command(capsys: Captured) -> None:
    """`palimpsest help edit` prints the same as `palimpsest edit --help`."""
    said = []
    for words in (["help", "edit"], ["edit", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "TARGET" in said[0]


def test_an_unknown_command_is_a_wrong_command(capsys: Captured) -> None:
    """An unknown command exits with 2 and is named in the message."""
    with pytest.raises(SystemExit) as ended:
        main(["edti"])
    assert ended.value.code == 2
    assert "edti" in capsys.readouterr().err


def test_the_overview_imports_no_heavy_modules() -> None:
    """Printing the overview imports none of the modules that take long to import."""
    asked = "import sys; from cli.entry import main; main([]); sys.stderr.write(' '.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert ran.stdout == overview()
    assert not {"rich", "httpx", "pydantic", "argparse", "torch"} & set(ran.stderr.split())


def test_a_command_imports_no_other_command() -> None:
    """A command imports its own module, and not what other commands need."""
    asked = "import sys; from cli.entry import main; code = main(['models', '--url', 'x']); sys.stderr.write(' '.join(sys.modules)); sys.exit(code)"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    modules = set(ran.stderr.split())
    assert ran.returncode == 2 and "cli.models" in modules
    assert not {"cli.edit", "cli.evaluate", "service.schemas", "torch"} & modules


@pytest.mark.parametrize("command", [*COMMANDS, "completion"])
def test_the_parser_of_one_command_is_that_of_the_whole(command: str, capsys: Captured) -> None:
    """The help of a command is the same whether its parser alone was built or that of the whole command line."""
    said = []
    for parser in (build_parser(command), build_parser()):
        with pytest.raises(SystemExit):
            parser.parse_args([command, "--help"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
