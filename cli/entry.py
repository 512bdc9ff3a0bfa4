"""What the installed `palimpsest` calls. The overview comes before the imports of the commands, which take ten times as long."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.overview import overview

HELP = ("help", "--help", "-h")


def main(argv: Sequence[str] | None = None) -> int:
    """No words: the overview. `help COMMAND` is `COMMAND --help`. All else is a command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (len(words) == 1 and words[0] in HELP):
        sys.stdout.write(overview())
        return 0
    from cli import main as commands

    return commands.main([*words[1:], "--help"] if words[0] == "help" else words)
