"""`palimpsest ledger`: list the entries of the ledger, or verify it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from cli.client import add_client_command
from cli.edit_output import fact_text
from cli.job_output import format_minute
from cli.terminal import err, format_list, format_pairs, out, print_json, strip_control_chars
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands, "ledger", show_ledger, description="List applied and reverted edits, oldest first."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="verify the chains, the signatures, the factors and the weights of the workers",
    )
    add_anchor_flags(parser)


def add_anchor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a verification."""
    parser.add_argument(
        "--expect", metavar="VERSION:HASH", help="ledger entry that an earlier verification printed as `head`"
    )
    parser.add_argument(
        "--expect-record",
        metavar="POSITION:HASH",
        help="audit record that an earlier verification printed as `record`",
    )
    parser.add_argument("--full", action="store_true", help="read the bytes of all factors again")


def show_ledger(args: argparse.Namespace, client: Client) -> int:
    """Print the ledger, oldest entry first, or verify it."""
    if args.verify:
        return verify_ledger(args, client)
    entries = [entry.raw for entry in client.ledger()]
    if args.json:
        print_json(entries)
        return 0
    rows = [
        (e["version"], e["kind"], e["edit_id"], format_minute(e["at"]), fact_text({**(e.get("body") or {}), **e}), e["actor"])
        for e in entries
    ]  # fmt: skip
    if not rows:
        out.print("The ledger is empty: the head is version 0, the base model.")
        return 0
    columns = ("version", "entry", "edit", "time (UTC)", "fact", "actor")
    out.print(format_list(columns, rows, ("fact", "actor")))
    return 0


def verify_ledger(args: argparse.Namespace, client: Client) -> int:
    """Return 0 when the ledger is valid."""
    verification = client.verify(expect=args.expect, expect_record=args.expect_record, full=args.full)
    return report_verification(verification.raw, args.json)


def report_verification(verification: Mapping[str, Any], as_json: bool) -> int:
    """Print a verification; return 0 when the ledger is valid."""
    if as_json:
        print_json(dict(verification))
        return 0 if verification["ok"] else 1
    head, record = verification.get("head", 0), verification.get("record") or {}
    anchors = {
        "head": f"{head}:{verification['head_hash']}" if verification.get("head_hash") else head,
        "record": f"{record['position']}:{record['hash']}" if record else "none",
    }
    out.print(format_pairs({"entries": verification.get("entries", 0), **anchors}))
    if verification["ok"]:
        out.print("The ledger is valid: every hash, every signature, every factor and every replica matches.")
        return 0
    for finding in verification["findings"]:
        text = finding if isinstance(finding, str) else json.dumps(finding, ensure_ascii=False)
        err.print(strip_control_chars(text))
    if (more := verification.get("finding_count", 0) - len(verification["findings"])) > 0:
        err.print(f"… and {more} more.")
    return 1
