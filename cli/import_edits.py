"""`palimpsest import`: apply the edits of a file that another service exported."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from cli.client import add_client_command
from cli.edit_output import fact_text, status_text
from cli.job_output import failure_reason, wait_for_job
from cli.terminal import err, format_list, out, print_json, strip_control_chars
from palimpsest import Client
from service.errors import Misconfigured

PRESENT = "already present"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "import",
        import_edits,
        description="Apply the edits of a file with their exported factors. Edits that are already present are skipped.",
    )
    parser.add_argument("file", metavar="FILE", help="file made by `palimpsest export --format edits`")


def import_edits(args: argparse.Namespace, client: Client) -> int:
    """Import the edits of a file, and print the outcome of each."""
    try:
        data = Path(args.file).read_bytes()
    except OSError as error:
        raise Misconfigured(f"{args.file!r} cannot be read: {error.strerror or error}.") from None
    submitted, present_ids = client.submit_import(data)
    edits = [wait_for_job(client, edit).raw for edit in submitted]
    present = {edit["id"]: edit["id"] in present_ids for edit in edits}
    if args.json:
        print_json([{**e, "already_present": present[e["id"]]} for e in edits])
    else:
        rows = [
            (e["id"], PRESENT if present[e["id"]] else status_text(e), e.get("version"), fact_text(e))
            for e in edits
        ]
        out.print(format_list(("id", "status", "version", "fact"), rows, ("fact",)))
    not_applied = [e for e in edits if not present[e["id"]] and e["status"] not in ("applied", "superseded")]
    for e in not_applied:
        reason = failure_reason(e) or f"see palimpsest edits show {e['id']}"
        err.print(strip_control_chars(f"edit {e['id']} is {e['status']}: {reason}"))
    counts = Counter(PRESENT if present[e["id"]] else e["status"] for e in edits)
    err.print(", ".join(f"{count} {status}" for status, count in counts.items()) + ".")
    return 1 if not_applied else 0
