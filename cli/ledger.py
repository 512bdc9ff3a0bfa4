"""`palimpsest ledger`: list the entries of the ledger, or verify it."""

from __future__ import annotations

import argparse
import json

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
        help="verify the hash chain, the factors and the weights of the workers",
    )


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
    """Return 0 when the hash chain, the factors and the replicas match."""
    verification = client.verify()
    if args.json:
        print_json(verification.raw)
        return 0 if verification.ok else 1
    out.print(format_pairs({"entries": verification.entries, "head": verification.head}))
    if verification.ok:
        out.print("The ledger is valid: every hash, every factor and every replica matches.")
        return 0
    for finding in verification.findings:
        text = finding if isinstance(finding, str) else json.dumps(finding, ensure_ascii=False)
        err.print(strip_control_chars(text))
    return 1
