"""`palimpsest revert`: revert applied edits, or a batch of them, and cancel those that are not applied yet."""

from __future__ import annotations

import argparse

from cli.client import add_client_command
from cli.terminal import out, print_json
from palimpsest import Client, RevertResult
from service.errors import InvalidInput


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "revert",
        revert_edit,
        description="Revert an edit, also after later edits. Several edits, or a batch, are reverted together: all or none. An edit "
        "that is not applied yet is cancelled.",
    )
    parser.add_argument("id", metavar="ID", nargs="*", help="id, as listed by `palimpsest edits`")
    parser.add_argument("--batch", metavar="NAME", help="all edits of this batch")


def revert_edit(args: argparse.Namespace, client: Client) -> int:
    """Revert or cancel an edit, several, or a batch."""
    if bool(args.id) == (args.batch is not None):
        raise InvalidInput("give the ids of edits, or a batch with --batch.")
    if args.batch is not None:
        return report_reverts(args, client.revert_batch(args.batch))
    if len(args.id) > 1:
        return report_reverts(args, client.revert_many(args.id))
    edit = client.revert(args.id[0], wait=False)
    if args.json:
        print_json(edit.raw)
    elif edit.status == "reverted":
        out.print(f"Reverted {edit.id}. Version {edit.reverted_version} is the new head.")
    elif not edit.finished:
        out.print(f"Cancelling {edit.id}.")
    else:
        out.print(f"{edit.id} is {edit.status}; there is nothing to revert.")
    return 0


def report_reverts(args: argparse.Namespace, result: RevertResult) -> int:
    """Print what was done with several edits."""
    if args.json:
        print_json(result.raw)
        return 0
    done = {
        "reverted": len(result.reverted),
        "cancelled": len(result.cancelled),
        "had nothing to revert": len(result.unchanged),
    }
    counts = ", ".join(f"{count} {what}" for what, count in done.items() if count) or "No edits"
    out.print(f"{counts}. Version {result.version} is the newest.")
    return 0
