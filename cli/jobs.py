"""`palimpsest jobs`: what waits, runs and was given up; and another try for what was."""

from __future__ import annotations

import argparse
from urllib.parse import quote

from cli.client import Client
from cli.edits import fetch_newest, format_minute
from cli.terminal import format_list, out, print_json, strip_control_chars


def list_jobs(args: argparse.Namespace, client: Client) -> int:
    """The newest jobs of every kind."""
    filters = {"status": args.status, "kind": args.kind, "dead": "true" if args.dead else None}
    items = fetch_newest(client, "/jobs", args.limit, **filters)
    if args.json:
        print_json(items)
        return 0
    rows = [
        (j["id"], j["status"], j["attempts"], format_minute(j["created"]), failure_detail(j)) for j in items
    ]
    if not rows:
        out.print("There are no such jobs." if any(filters.values()) else "There are no jobs.")
        return 0
    out.print(format_list(("id", "status", "tries", "when (UTC)", "why"), rows, ("why",)))
    return 0


def failure_detail(job: dict[str, object]) -> object:
    """Why a job failed."""
    error = job.get("error")
    return error.get("detail") if isinstance(error, dict) else None


def retry_job(args: argparse.Namespace, client: Client) -> int:
    """Let a failed job wait again, as if it were new."""
    job = client.post(f"/jobs/{quote(args.id, safe='')}/retry", {})
    if args.json:
        print_json(job)
    else:
        out.print(strip_control_chars(f"{job['id']} is {job['status']} again."))
    return 0
