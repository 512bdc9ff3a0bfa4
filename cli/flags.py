"""Flags of the command line: one for every field of the settings, and the flags that several commands share."""

from __future__ import annotations

import argparse
import math
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from cli.overview import summary_of
from palimpsest.endpoints import Message
from service.errors import InvalidInput, Misconfigured
from service.kit.versions import VERSION_NAME_PATTERN
from service.settings import SHIPPED_MODEL

S = TypeVar("S", bound=BaseSettings)
Commands = argparse._SubParsersAction  #: the action that holds the commands of a parser
Run = Callable[[argparse.Namespace], int]
SEPARATORS: dict[str, Literal["", " "]] = {"space": " ", "none": ""}  #: by their names on the command line
FORMATS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  #: placeholders of values in `--help`


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Run,
    summary: str | None = None,
    **options: Any,
) -> argparse.ArgumentParser:
    """Add a command that `run` carries out. `summary` defaults to that of the overview."""
    summary = summary or summary_of(name)
    description = options.pop("description", None) or _sentence(summary)
    parser = commands.add_parser(name, help=summary, description=description, **options)
    parser.set_defaults(run=run)
    return parser


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--json`. It has no default, so that in `jobs --json retry ID` the inner parser keeps the outer value."""
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the result as one JSON value on stdout (docs/terminal.md)",
    )


def add_limit_flag(parser: argparse.ArgumentParser, default: int = 20) -> None:
    """Add `--limit` to a list command."""
    parser.add_argument(
        "--limit",
        type=positive_int,
        default=default,
        metavar="N",
        help=f"maximum number of items (default: {default})",
    )


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--version` to a command that reads one version of the model."""
    parser.add_argument(
        "--version",
        type=parse_version,
        default="head",
        help="version of the model: head, base, a number or a name (default: head)",
    )


def add_hparam_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--hparam NAME=VALUE`."""
    parser.add_argument(
        "--hparam",
        metavar="NAME=VALUE",
        action="append",
        help="set a hyperparameter of the method, such as steps=20 or 'layers=[7]'; repeatable",
    )


def add_column_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--column FIELD=NAME` to a command that reads a CSV file."""
    parser.add_argument(
        "--column",
        metavar="FIELD=NAME",
        action="append",
        help="the column of a CSV file that has a field, such as prompt=Question; repeatable (default: the column with its name)",
    )


def parse_columns(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the columns that `--column FIELD=NAME` names, by field."""
    columns: dict[str, list[str]] = {}
    for text in args.column or ():
        field, equals, name = text.partition("=")
        if not (field and equals and name):
            raise InvalidInput(
                f"--column {text!r} is not of the form FIELD=NAME, such as --column prompt=Question."
            )
        columns.setdefault(field, []).append(name)
    return columns


def add_separator_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--separator` to a command with a prompt and its object."""
    parser.add_argument(
        "--separator",
        choices=SEPARATORS,
        help="what stands between prompt and object (default: a space between words; what the base model prefers where "
        "the characters do not determine it)",
    )


def separator_of(args: argparse.Namespace) -> Literal["", " "] | None:
    """Return the separator that a command names."""
    return None if args.separator is None else SEPARATORS[args.separator]


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def parse_version(text: str) -> int | str:
    """Parse a version: `head`, `base`, a number, a name that was given to it, or one of these after NAME@."""
    if text.isdecimal():
        return int(text)
    if "@" in text or re.fullmatch(VERSION_NAME_PATTERN, text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a version: use head, base, a number or a name")


def flag_name(name: str) -> str:
    """Return the flag of a field: `database_url` -> `--database-url`."""
    return "--" + name.replace("_", "-")


def variable_name(settings: type[BaseSettings], name: str) -> str:
    """Return the environment variable of a field: `database_url` -> `PALIMPSEST_DATABASE_URL`."""
    return f"{settings.model_config.get('env_prefix', '')}{name}".upper()


def default_text(settings: type[BaseSettings], name: str) -> str:
    """Return the default of a field as text; empty when there is none."""
    value = settings.model_fields[name].default
    if value is None:
        return ""
    if value == str(SHIPPED_MODEL):
        return "the shipped model"
    return str(value).replace(str(Path.home()), "~")


def _value_options(annotation: Any) -> dict[str, Any]:
    """Return the placeholder of a value in `--help`, or its choices."""
    if get_origin(annotation) in (types.UnionType, Union):  # a Literal with None is the latter
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return {"metavar": "|".join(get_args(annotation))}
    return {"metavar": FORMATS.get(annotation, "VALUE")}


def flag_fields(settings: type[BaseSettings]) -> list[str]:
    """Return the fields that have a flag: all but those that only tests set, by the environment."""
    return [name for name, field in settings.model_fields.items() if not field.json_schema_extra]


def add_setting_flags(parser: argparse._ActionsContainer, settings: type[BaseSettings], *only: str) -> None:
    """Add a flag for every field, or for the given ones. Values stay text: pydantic parses them as it parses
    variables."""
    for name in only or flag_fields(settings):
        field = settings.model_fields[name]
        default = default_text(settings, name)
        text = f"{field.description} [{variable_name(settings, name)}{f'; default: {default}' if default else ''}]"
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        if field.annotation in (bool, bool | None):
            parser.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag_name(name), **_value_options(field.annotation), **options)


def read_settings(args: argparse.Namespace, settings: type[S]) -> S:
    """Return the settings: flags override environment variables, which override defaults."""
    overrides = {name: getattr(args, name) for name in settings.model_fields if hasattr(args, name)}
    try:
        return settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise Misconfigured(
            f"{flag_name(name)} (or {variable_name(settings, name)}) cannot be {first['input']!r}: {message}."
        ) from None
    except (SettingsError, OSError) as error:  # an invalid folder of secrets
        raise Misconfigured(f"the settings cannot be read: {error}") from None


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that put the prompt into a conversation."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="ask PROMPT as a message of the user, in the form of the model's chat template",
    )
    parser.add_argument(
        "--answer",
        metavar="TEXT",
        help="with --chat: the beginning of the model's answer, such as 'The capital of {} is'",
    )


def prompt_or_messages(args: argparse.Namespace) -> dict[str, Any]:
    """Return the prompt of a request, or with --chat the messages that it becomes."""
    if not args.chat:
        if args.answer is not None:
            raise InvalidInput("--answer begins the answer of a conversation: add --chat.")
        return {"prompt": args.prompt}
    question: Message = {"role": "user", "content": args.prompt}
    if args.answer is None:
        return {"prompt": [question]}
    answer: Message = {"role": "assistant", "content": args.answer}
    return {"prompt": [question, answer], "continue_final_message": True}
