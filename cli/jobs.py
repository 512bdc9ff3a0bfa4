"""`palimpsest jobs`: what waits, runs and was given up; and another try for what was."""

from __future__ import annotations

import argparse
from itertools import islice
from urllib.parse import quote

from cli.client import Client
from cli.edits import PAGE, minute
from cli.screen import out, plain, table


def jobs(args: argparse.Namespace, client: Client) -> int:
    """The newest jobs of every kind."""
    asked = {"status": args.status, "kind": args.kind, "dead": "true" if args.dead else None}
    found = client.items("/jobs", **asked, limit=min(args.limit, PAGE))
    rows = [
        (j["id"], j["kind"], j["status"], j["attempts"], minute(j["created"]), reason(j))
        for j in islice(found, args.limit)
    ]
    if not rows:
        out.print("There are no such jobs." if any(asked.values()) else "There are no jobs.")
        return 0
    out.print(table("", ("id", "kind", "status", "attempts", "when (UTC)", "why"), rows))
    return 0


def reason(job: dict[str, object]) -> object:
    """Why a job failed."""
    error = job.get("error")
    return error.get("detail") if isinstance(error, dict) else None


def retry(args: argparse.Namespace, client: Client) -> int:
    """Let a failed job wait again, as if it were new."""
    job = client.post(f"/jobs/{quote(args.id, safe='')}/retry", {})
    out.print(plain(f"{job['id']} is {job['status']} again."))
    return 0
