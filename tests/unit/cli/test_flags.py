"""The flags of a command are its settings: cli.flags."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cli.client import ClientSettings
from cli.flags import add_setting_flags, flag_name, read_settings
from cli.main import build_parser
from service.errors import Misconfigured
from service.settings import Settings
from tests.support.parsers import iter_commands


def make_parser(settings: type[Settings] | type[ClientSettings]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, settings)
    return parser


def test_every_setting_is_a_flag_of_serve() -> None:
    """`palimpsest serve` has a flag for each setting but those of tests, and no other flags. Its help names the
    environment variable of each."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    serve = commands.choices["serve"]
    flags = {option for action in serve._actions for option in action.option_strings} - {"-h", "--help"}
    names = set(Settings.model_fields) - {"crash_at"}
    assert flags == {flag_name(name) for name in names} | {"--no-development"}
    help_text = serve.format_help()
    assert all(f"PALIMPSEST_{name.upper()}" in help_text for name in names)
    assert "CRASH_AT" not in help_text


def test_every_argument_is_explained() -> None:
    """Each argument of each command has a help text, and each value a placeholder that says what it is."""
    for words, parser in iter_commands(build_parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                assert {choice.dest for choice in action._choices_actions} == set(action.choices), words
                continue
            assert action.help, (words, action.dest)
            assert action.metavar not in ("LITERAL", "VALUE"), (words, action.dest)


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag overrides the environment, which overrides the default."""
    monkeypatch.setenv("PALIMPSEST_PORT", "1234")
    monkeypatch.setenv("PALIMPSEST_MAX_QUEUE", "7")
    args = make_parser(Settings).parse_args(["--port", "4321", "--data-dir", "/somewhere"])
    settings = read_settings(args, Settings)
    assert (settings.port, settings.max_queue, settings.threads) == (4321, 7, None)
    assert settings.data_dir == Path("/somewhere")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--port", "ninety"], ["--port", "PALIMPSEST_PORT", "'ninety'", "integer"]),
        (["--max-queue", "0"], ["--max-queue", "greater than or equal to 1"]),
    ],
)
def test_a_wrong_value_is_reported_with_flag_and_variable(asked: list[str], said: list[str]) -> None:
    """The error of an invalid value names the flag, the variable, the value and what is expected."""
    with pytest.raises(Misconfigured) as caught:
        read_settings(make_parser(Settings).parse_args(asked), Settings)
    assert all(word in caught.value.detail for word in said)
    assert "pydantic" not in caught.value.detail


def test_help_names_no_path_of_this_machine() -> None:
    """The defaults in the help contain no path of the machine."""
    text = make_parser(Settings).format_help()
    assert str(Path.home()) + "/" not in text
    assert "the shipped model" in " ".join(text.split())
