"""The commands of a parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def iter_commands(
    parser: argparse.ArgumentParser, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command by its words, with its parser."""
    if "run" in parser._defaults:
        yield words.strip(), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from iter_commands(below, f"{words} {name}")
