"""`completion`: the script that lets a shell complete commands and flags. It is made of the parser itself, by shtab, and
starts nothing when a key is pressed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cli.terminal import out

SHELLS = ("bash", "zsh", "fish")
#: what a value is called in the help -> what shtab completes it with
PLACES = {"FILE": "file", "FOLDER": "directory", "PATH": "file"}
#: where each shell looks for it
WHERE = """\
where it goes:
  bash  eval "$(palimpsest completion bash)"     in ~/.bashrc
  zsh   palimpsest completion zsh > ~/.zfunc/_palimpsest
        with `fpath+=~/.zfunc` before `autoload -Uz compinit && compinit` in ~/.zshrc
  fish  palimpsest completion fish > ~/.config/fish/completions/palimpsest.fish

Start a new shell, type `palimpsest ed` and press Tab. Make the script anew after an upgrade."""


def run(args: argparse.Namespace) -> int:
    """The script for one shell, on stdout."""
    from cli.main import build

    out.file.write(script(build(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The whole command line for one shell."""
    import shtab

    for action in actions(parser):
        if action.metavar in PLACES:
            action.complete = shtab.CHOICE_FUNCTIONS[PLACES[str(action.metavar)]]  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell)) + "\n"


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of the parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)
