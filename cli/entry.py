"""Entry point of the installed `palimpsest`. It prints the overview and the version without importing the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.overview import overview

HELP = ("help", "--help", "-h")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Without arguments print the overview; `help COMMAND` is `COMMAND --help`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (len(words) == 1 and words[0] in HELP):
        sys.stdout.write(overview())
        return 0
    if words == ["--version"]:
        sys.stdout.write(f"palimpsest {installed_version()}\n")
        return 0
    from cli import main as commands

    return commands.main([*words[1:], "--help"] if words[0] == "help" else words)


def installed_version() -> str:
    """Return the version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("palimpsest")
    except PackageNotFoundError:
        return "unknown: the distribution is not installed"
