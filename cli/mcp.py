"""`palimpsest mcp`: a server of the Model Context Protocol over stdin and stdout, for assistants."""

from __future__ import annotations

import argparse

from cli.client import RESPONSE_TIMEOUT, ClientSettings, add_connection_flags
from cli.flags import add_command, read_settings
from service.errors import Misconfigured
from service.kit.extras import install_command


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "mcp",
        run,
        description="Serve tools to an assistant over stdin and stdout (Model Context Protocol): ask the model, try an edit, apply it, "
        "trace and revert. The service must run; an edit is applied only after a dry run.",
    )
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stdin ends."""
    try:
        from cli.mcp_tools import build_server
    except ModuleNotFoundError as error:
        if error.name != "mcp":
            raise
        raise Misconfigured(f"the package mcp is missing: {install_command('mcp')}") from None
    from palimpsest import AsyncClient

    settings = read_settings(args, ClientSettings)
    try:
        client = AsyncClient(settings.url, settings.api_key, timeout=RESPONSE_TIMEOUT)
    except ValueError as error:
        raise Misconfigured(str(error)) from None
    build_server(client).run("stdio")
    return 0
