"""`palimpsest jobs`: what waits, runs and was given up; and another try for what was."""

from __future__ import annotations

import argparse
from urllib.parse import quote

from cli.client import Client
from cli.edits import minute, newest
from cli.terminal import listing, out, plain, print_json


def jobs(args: argparse.Namespace, client: Client) -> int:
    """The newest jobs of every kind."""
    asked = {"status": args.status, "kind": args.kind, "dead": "true" if args.dead else None}
    found = newest(client, "/jobs", args.limit, **asked)
    if args.json:
        print_json(found)
        return 0
    rows = [(j["id"], j["status"], j["attempts"], minute(j["created"]), reason(j)) for j in found]
    if not rows:
        out.print("There are no such jobs." if any(asked.values()) else "There are no jobs.")
        return 0
    out.print(listing(("id", "status", "tries", "when (UTC)", "why"), rows, ("why",)))
    return 0


def reason(job: dict[str, object]) -> object:
    """Why a job failed."""
    error = job.get("error")
    return error.get("detail") if isinstance(error, dict) else None


def retry(args: argparse.Namespace, client: Client) -> int:
    """Let a failed job wait again, as if it were new."""
    job = client.post(f"/jobs/{quote(args.id, safe='')}/retry", {})
    if args.json:
        print_json(job)
    else:
        out.print(plain(f"{job['id']} is {job['status']} again."))
    return 0
