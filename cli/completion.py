"""`palimpsest completion`: print a shell completion script, generated from the parser by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from cli.flags import add_command
from cli.terminal import out

SHELLS = ("bash", "zsh", "fish")
#: placeholder of a value in `--help` -> completion of shtab
METAVAR_COMPLETIONS = {"FILE": "file", "FOLDER": "directory", "PATH": "file"}
INSTALL_HELP = """\
installation:
  bash  eval "$(palimpsest completion bash)"     in ~/.bashrc
  zsh   palimpsest completion zsh > ~/.zfunc/_palimpsest
        with `fpath+=~/.zfunc` before `autoload -Uz compinit && compinit` in ~/.zshrc
  fish  palimpsest completion fish > ~/.config/fish/completions/palimpsest.fish

Start a new shell, type `palimpsest ed` and press Tab. Print the script again after an upgrade."""


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], root: argparse.ArgumentParser
) -> None:
    """Add the command. `root` is the parser of the whole command line, which the script completes."""
    parser = add_command(
        commands,
        "completion",
        partial(run, root),
        description="Print a script that completes commands, flags and files in a shell.",
        epilog=INSTALL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="name of the shell")


def run(root: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Print the script of a shell on stdout."""
    out.file.write(completion_script(root, args.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of a parser."""
    import shtab

    for action in iter_actions(parser):
        if action.metavar in METAVAR_COMPLETIONS:
            action.complete = shtab.CHOICE_FUNCTIONS[METAVAR_COMPLETIONS[str(action.metavar)]]  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell)) + "\n"


def iter_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every argument of a parser and of its subparsers."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from iter_actions(subparser)
