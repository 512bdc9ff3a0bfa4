"""`palimpsest` with no word, and what the first word may be."""

from __future__ import annotations

import argparse
import subprocess
import sys
import unicodedata

import pytest

from cli.entry import main
from cli.main import build_parser
from cli.overview import OVERVIEW, overview

Captured = pytest.CaptureFixture[str]


def test_every_command_has_its_line() -> None:
    """The overview names each command of the parser once, and none that is not there."""
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    named = [name for group in OVERVIEW.values() for name in group]
    assert sorted(named) == sorted(commands)


def test_it_is_one_screen_of_plain_text() -> None:
    """80 columns and 40 lines hold it, and no control code is in it: it reads the same in a pipe."""
    lines = overview().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert not [c for c in overview() if unicodedata.category(c) == "Cc" and c != "\n"]


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_no_command_prints_the_overview(capsys: Captured, words: list[str]) -> None:
    """Whoever gives no command, or asks for help, is told what there is, with exit code 0."""
    assert main(words) == 0
    assert capsys.readouterr() == (overview(), "")


def test_help_of_a_command(capsys: Captured) -> None:
    """`palimpsest help edit` is `palimpsest edit --help`."""
    said = []
    for words in (["help", "edit"], ["edit", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "TARGET" in said[0]


def test_an_unknown_command_is_a_wrong_command(capsys: Captured) -> None:
    """A word that is no command is exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(["edti"])
    assert ended.value.code == 2
    assert "edti" in capsys.readouterr().err


def test_the_overview_imports_no_heavy_modules() -> None:
    """Nothing that takes time is imported to show what there is."""
    asked = "import sys; from cli.entry import main; main([]); sys.stderr.write(' '.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert ran.stdout == overview()
    assert not {"rich", "httpx", "pydantic", "argparse", "torch"} & set(ran.stderr.split())
