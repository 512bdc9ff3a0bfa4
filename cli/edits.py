"""`palimpsest edits` and `palimpsest edits show`: list edits, and show one with its measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from cli.client import add_client_command, add_show_command
from cli.edit_output import fact_text, print_edit_result, status_text
from cli.flags import add_limit_flag
from cli.job_output import failure_reason, format_minute
from cli.terminal import format_list, format_pairs, out, print_json, strip_control_chars, table
from palimpsest import Client
from service.errors import InvalidInput

FILTERS = ("status", "subject", "search", "actor", "batch", "since", "until")  #: flags of the list
#: ending of a file -> form of the list in it
SAVED_FORMS: dict[str, Literal["csv", "json"]] = {".csv": "csv", ".json": "json"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = add_client_command(commands, "edits", list_edits, description="List edits, newest first.")
    parser.add_argument(
        "--status", help="only edits with this status: queued, running, applied, reverted, superseded, rejected, ..."
    )  # fmt: skip
    parser.add_argument("--subject", metavar="TEXT", help="only edits of this subject")
    parser.add_argument(
        "--search", metavar="WORDS", help="only edits with these words in subject, prompt or objects"
    )
    parser.add_argument("--actor", metavar="NAME", help="only edits by this caller, such as key:nightly-eval")
    parser.add_argument("--batch", metavar="NAME", help="only edits of this batch")
    parser.add_argument(
        "--since", metavar="TIME", help="only edits created at or after this day or time (UTC)"
    )
    parser.add_argument(
        "--until", metavar="TIME", help="only edits created before this time, or up to this day"
    )
    add_limit_flag(parser)
    parser.add_argument(
        "--save", metavar="FILE", help="write all edits that match to a new .csv or .json file instead"
    )
    add_show_command(parser, show_edit, "show one edit with its measurements and guard checks", "edits")


def list_edits(args: argparse.Namespace, client: Client) -> int:
    """Print the newest edits, or write all of them to a file."""
    filters = {name: getattr(args, name) for name in FILTERS}
    if args.save is not None:
        return save_edits(args, client, filters)
    items = [edit.raw for edit in client.edits(limit=args.limit, **filters)]
    if args.json:
        print_json(items)
        return 0
    rows = [
        (e["id"], status_text(e), e.get("version"), format_minute(e.get("created")), fact_text(e))
        for e in items
    ]
    if not rows:
        out.print("No edits match." if any(filters.values()) else "There are no edits.")
        return 0
    out.print(format_list(("id", "status", "version", "created (UTC)", "fact"), rows, ("fact",)))
    return 0


def save_edits(args: argparse.Namespace, client: Client, filters: dict[str, str | None]) -> int:
    """Write all edits that match to a new file; its ending says in which form."""
    path = Path(args.save)
    form = SAVED_FORMS.get(path.suffix.lower())
    if form is None:
        raise InvalidInput(f"--save {args.save!r} must end in {' or '.join(SAVED_FORMS)}.")
    try:
        with path.open("xb") as file:
            client.save_edits(file, form, **filters)
    except OSError as error:
        raise InvalidInput(f"--save {args.save!r} cannot be written: {error.strerror or error}.") from None
    if args.json:
        print_json({"path": str(path)})
    else:
        out.print(strip_control_chars(str(path)))
    return 0


def show_edit(args: argparse.Namespace, client: Client) -> int:
    """Print one edit: its fields, its measurements and the checks of the guard."""
    edit = client.get_edit(args.id).raw
    if args.json:
        print_json(edit)
        return 0
    result = edit.get("result") or {}
    details = {
        "edit": edit["id"],
        "status": status_text(edit),
        "fact": fact_text(edit),
        "method": edit.get("method"),
        "layers": ", ".join(map(str, result.get("layers") or ())) or None,
        "applied": edit.get("version") and f"as version {edit['version']}",
        "reverted": edit.get("reverted_version") and f"as version {edit['reverted_version']}",
        "superseded by": edit.get("superseded_by"),
        "batch": edit.get("batch"),
        "actor": edit.get("actor"),
        "created (UTC)": format_minute(edit.get("created")),
        "seconds": result.get("seconds"),
        "reason": failure_reason(edit),
    }
    out.print(format_pairs(details))
    if result:
        out.print()
        print_edit_result(edit)
        if checks := (result.get("guard") or {}).get("checks"):
            rows = [
                (c["name"], c["figure"], c["limit"], "passed" if c["passed"] else "failed") for c in checks
            ]
            out.print()
            out.print(table("", ("guard check", "value", "limit", ""), rows))
    return 0
