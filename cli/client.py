"""Commands that call a running service through the `palimpsest` client."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from palimpsest import Client
from service.errors import Misconfigured

ClientCommand = Callable[[argparse.Namespace, Client], int]
RESPONSE_TIMEOUT = 3600.0  # seconds; a long generation on a CPU takes minutes


class ClientSettings(BaseSettings):
    """How to reach the service. `docs/settings.md` lists every field."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    url: str = Field("http://127.0.0.1:8000", description="address of the service")
    api_key: str | None = Field(None, description="API key, if the service requires one")


def add_client_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: ClientCommand,
    summary: str | None = None,
    **options: Any,
) -> argparse.ArgumentParser:
    """Add a command that calls a running service."""
    parser = add_command(commands, name, partial(run_with_client, command), summary, **options)
    add_json_flag(parser)
    add_connection_flags(parser)
    return parser


def add_show_command(
    list_parser: argparse.ArgumentParser, command: ClientCommand, summary: str, list_command: str
) -> argparse.ArgumentParser:
    """Add `show ID` below a list command."""
    verbs = list_parser.add_subparsers(title="commands", metavar="COMMAND")
    show = add_client_command(verbs, "show", command, summary)
    show.add_argument("id", metavar="ID", help=f"id, as listed by `palimpsest {list_command}`")
    return show


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--url` and `--api-key`."""
    add_setting_flags(parser.add_argument_group("connection"), ClientSettings)


def run_with_client(command: ClientCommand, args: argparse.Namespace) -> int:
    """Run a command with a client of the configured service."""
    settings = read_settings(args, ClientSettings)
    try:
        client = Client(settings.url, settings.api_key, timeout=RESPONSE_TIMEOUT)
    except ValueError:
        raise Misconfigured(
            f"--url (or PALIMPSEST_URL) cannot be {settings.url!r}: use a form such as http://127.0.0.1:8000."
        ) from None
    with client:
        return command(args, client)
