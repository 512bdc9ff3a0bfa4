"""`palimpsest versions`: list, give and delete names of versions, and show what differs between two versions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cli.client import add_client_command
from cli.edit_output import object_text, stated_text
from cli.flags import parse_version
from cli.job_output import format_minute
from cli.terminal import format_list, out, print_json
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = add_client_command(
        commands, "versions", show_names, description="List the names that were given to versions."
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    name = add_client_command(verbs, "name", add_name, "give a name to a version")
    name.add_argument("name", metavar="NAME", help="begins with a letter, such as before-release")
    name.add_argument(
        "version", metavar="VERSION", nargs="?", type=parse_version, default="head", help="head, base, a number or a name (default: head)"
    )  # fmt: skip
    delete = add_client_command(verbs, "delete", remove_name, "delete a name; the version stays")
    delete.add_argument("name", metavar="NAME", help="name, as listed by `palimpsest versions`")
    diff = add_client_command(
        verbs, "diff", show_difference, "list the facts that differ between two versions"
    )
    diff.add_argument("before", metavar="A", type=parse_version, help="head, base, a number or a name")
    diff.add_argument(
        "after", metavar="B", nargs="?", type=parse_version, default="head", help="the other version (default: head)"
    )  # fmt: skip


def show_names(args: argparse.Namespace, client: Client) -> int:
    """Print the names of versions."""
    items = [named.raw for named in client.version_names()]
    if args.json:
        print_json(items)
        return 0
    rows = [(n["name"], n["version"], n["model"], format_minute(n["created"]), n["actor"]) for n in items]
    if not rows:
        out.print("No version has a name. Give one: palimpsest versions name NAME")
        return 0
    out.print(format_list(("name", "version", "model", "named (UTC)", "actor"), rows, ("actor",)))
    return 0


def add_name(args: argparse.Namespace, client: Client) -> int:
    """Give a name to a version."""
    named = client.name_version(args.name, args.version)
    if args.json:
        print_json(named.raw)
    else:
        out.print(f"{named.name} is version {named.version}. Below /v1 it is the model {named.model}.")
    return 0


def remove_name(args: argparse.Namespace, client: Client) -> int:
    """Delete a name."""
    named = client.delete_version_name(args.name)
    if args.json:
        print_json(named.raw)
    else:
        out.print(f"{named.name} no longer names version {named.version}, which stays.")
    return 0


def show_difference(args: argparse.Namespace, client: Client) -> int:
    """Print the facts whose active edit differs between two versions."""
    changes = [change.raw for change in client.diff(args.before, args.after)]
    if args.json:
        print_json(changes)
        return 0
    rows = [
        (c["change"], stated_text(c), object_of(c["before"]), object_of(c["after"]), edit_of(c))
        for c in changes
    ]
    if not rows:
        out.print("The same edits are active at both versions.")
        return 0
    columns = ("change", "fact", f"at {args.before}", f"at {args.after}", "edit")
    out.print(format_list(columns, rows, columns[1:4]))
    return 0


def object_of(side: Mapping[str, Any] | None) -> str | None:
    """Return the object that an edit writes; nothing without an edit."""
    return object_text(side) if side else None


def edit_of(change: Mapping[str, Any]) -> str:
    """Return the id of the edit that is active afterwards, else of the one that was."""
    return str((change["after"] or change["before"])["edit_id"])
