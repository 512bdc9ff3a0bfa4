"""Settings as flags: one flag for every field of `service.settings.Settings`, derived from the fields themselves."""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from service.errors import Misconfigured
from service.settings import SHIPPED_MODEL

S = TypeVar("S", bound=BaseSettings)


def flag_name(name: str) -> str:
    """`database_url` -> `--database-url`."""
    return "--" + name.replace("_", "-")


def variable_name(settings: type[BaseSettings], name: str) -> str:
    """`database_url` -> `PALIMPSEST_DATABASE_URL`."""
    return f"{settings.model_config.get('env_prefix', '')}{name}".upper()


def default_text(settings: type[BaseSettings], name: str) -> str:
    """The default of a field in words; empty when there is none to show."""
    value = settings.model_fields[name].default
    if value is None:
        return ""
    if value == str(SHIPPED_MODEL):
        return "the shipped model"
    return str(value).replace(str(Path.home()), "~")


def _metavar(annotation: Any) -> str:
    """What a value looks like, for `--help`: the plain type's name without `None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    name = getattr(annotation, "__name__", "value").upper()
    return "TEXT" if name == "STR" else name


def add_setting_flags(parser: argparse._ActionsContainer, settings: type[BaseSettings], *only: str) -> None:
    """A flag for every field, or for these. Values stay text: pydantic reads them, as it reads the environment."""
    for name in only or settings.model_fields:
        field = settings.model_fields[name]
        default = default_text(settings, name)
        text = f"{field.description} [{variable_name(settings, name)}{f'; default: {default}' if default else ''}]"
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        if field.annotation is bool:
            parser.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag_name(name), metavar=_metavar(field.annotation), **options)


def read_settings(args: argparse.Namespace, settings: type[S]) -> S:
    """Flags before environment before defaults."""
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
    except (SettingsError, OSError) as error:  # the folder of secrets
        raise Misconfigured(f"the settings cannot be read: {error}") from None


def positive_int(text: str) -> int:
    """A whole number from 1 on, as the value of a flag."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
