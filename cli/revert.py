"""`palimpsest revert`: revert an applied edit, or cancel one that is not applied yet."""

from __future__ import annotations

import argparse

from cli.client import add_client_command
from cli.terminal import out, print_json
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "revert",
        revert_edit,
        description="Revert an edit, also after later edits. An edit that is not applied yet is cancelled.",
    )
    parser.add_argument("id", metavar="ID", help="id, as listed by `palimpsest edits`")


def revert_edit(args: argparse.Namespace, client: Client) -> int:
    """Revert or cancel an edit."""
    edit = client.revert(args.id, wait=False)
    if args.json:
        print_json(edit.raw)
    elif edit.status == "reverted":
        out.print(f"Reverted {edit.id}. Version {edit.reverted_version} is the new head.")
    elif not edit.finished:
        out.print(f"Cancelling {edit.id}.")
    else:
        out.print(f"{edit.id} is {edit.status}; there is nothing to revert.")
    return 0
