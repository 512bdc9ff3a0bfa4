"""`completion`: the script that lets a shell complete commands and flags. It is made of the parser itself, by shtab, and
starts nothing when a key is pressed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cli.terminal import out

SHELLS = ("bash", "zsh", "fish")
#: what a value is called in the help -> what shtab completes it with
METAVAR_COMPLETIONS = {"FILE": "file", "FOLDER": "directory", "PATH": "file"}
#: where each shell looks for it
INSTALL_HELP = """\
where it goes:
  bash  eval "$(palimpsest completion bash)"     in ~/.bashrc
  zsh   palimpsest completion zsh > ~/.zfunc/_palimpsest
        with `fpath+=~/.zfunc` before `autoload -Uz compinit && compinit` in ~/.zshrc
  fish  palimpsest completion fish > ~/.config/fish/completions/palimpsest.fish

Start a new shell, type `palimpsest ed` and press Tab. Make the script anew after an upgrade."""


def run(args: argparse.Namespace) -> int:
    """The script for one shell, on stdout."""
    from cli.main import build_parser

    out.file.write(completion_script(build_parser(), args.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The whole command line for one shell."""
    import shtab

    for action in iter_actions(parser):
        if action.metavar in METAVAR_COMPLETIONS:
            action.complete = shtab.CHOICE_FUNCTIONS[METAVAR_COMPLETIONS[str(action.metavar)]]  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell)) + "\n"


def iter_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of the parsers below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from iter_actions(subparser)
