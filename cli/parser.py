"""The parser of a command. Its errors name the word that is wrong, and a similar one that is right."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

UNKNOWN_ARGUMENTS = "there is no option or argument {}"


class CommandParser(argparse.ArgumentParser):
    """A parser without abbreviations of flags, which suggests a similar word for a wrong one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | options))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for a value that is none of the choices. argparse calls it for each value."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            None if isinstance(action, argparse._SubParsersAction) else action,
            self._unknown_value(action, str(value), choices),
        )

    def _unknown_value(self, action: argparse.Action, value: str, choices: Sequence[str]) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return f"{value!r} is not one of {', '.join(choices)}{suggestion(value, choices)}"
        listed = f": use {', '.join(choices)}" if len(choices) < 8 else f"; `{self.prog} --help` lists them"
        return f"there is no command {value!r}{suggestion(value, choices) or listed}"

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words. A word that no argument takes is an error that names similar flags of the command."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = ", ".join(map(repr, unknown))
            flags = [flag for parser in self._parsers(args or ()) for flag in parser._option_string_actions]
            hints = (suggestion(word.partition("=")[0], flags) for word in unknown if word.startswith("-"))
            self.error(UNKNOWN_ARGUMENTS.format(words) + next(filter(None, hints), ""))
        return found

    def _parsers(self, words: Iterable[str]) -> Iterator[argparse.ArgumentParser]:
        """Yield this parser and those of the commands that the words name."""
        parser: argparse.ArgumentParser = self
        yield parser
        for word in words:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                    parser = action.choices[word]
                    yield parser


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return `: did you mean 'edit'?` for a word that is similar to a known one, else an empty text."""
    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean {matches[0]!r}?" if matches else ""
