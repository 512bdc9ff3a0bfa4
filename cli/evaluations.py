"""`evaluate --service`, `evaluations`, `evaluations show`: evaluations as jobs of the running service."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli.client import Client
from cli.edits import follow, minute, newest, unfinished
from cli.evaluate import plan_of, read_result, said_of, written
from cli.evaluate import show as shown
from cli.terminal import err, listing, out, plain, print_json
from service.datasets.records import rows_of
from service.errors import InvalidInput

#: what the service does not do: it takes records in the seed's order, and has plain texts of its own
HERE = ("half", "distinct", "texts")


def evaluate(args: argparse.Namespace, client: Client) -> int:
    """Ask for an evaluation, follow it to its end, write result and report, and say what came of it."""
    body = request_of(args)
    beside = [read_result(Path(name)) for name in args.beside or ()]
    evaluation = client.post("/evaluations", body)
    err.print(plain(f"{evaluation['id']} goes on in the service, also when this command is stopped."))
    ended = follow(client, evaluation)
    if ended["status"] != "done":
        if args.json:
            print_json(ended)
        return unfinished("evaluation", ended)
    written(Path(args.out), [ended["result"], *beside])
    said_of(ended["result"], Path(args.out), args.json)
    return 0


def request_of(args: argparse.Namespace) -> dict[str, Any]:
    """The body of POST /evaluations."""
    if given := [name for name in HERE if getattr(args, name) not in (None, False, "all")]:
        raise InvalidInput(
            f"--{given[0]} is for an evaluation that is computed here: leave it or --service out."
        )
    body = plan_of(args).model_dump(mode="json", exclude_unset=True)
    if args.limit is not None:
        body["limit"] = args.limit
    known = {"dataset": "facts"} if args.source == "facts" else {"records": rows_of(Path(args.source))}
    return body | known


def evaluations(args: argparse.Namespace, client: Client) -> int:
    """The newest evaluations, without what they found."""
    found = newest(client, "/evaluations", args.limit)
    if args.json:
        print_json(found)
        return 0
    if not found:
        out.print("There are no evaluations.")
        return 0
    rows = [(e["id"], e["status"], minute(e["created"]), asked(e)) for e in found]
    out.print(listing(("id", "status", "when (UTC)", "what"), rows, ("what",)))
    return 0


def asked(evaluation: dict[str, Any]) -> str:
    """What an evaluation is of, and how far it is while it runs."""
    request, progress = evaluation["request"], evaluation.get("progress")
    limit, many = request.get("limit"), request.get("records")
    what = request.get("dataset") or (f"{many} records" if isinstance(many, int) else "records")
    records = what if limit is None else f"{limit} of {what}"
    said = f"{request['objective']} by {request['method']}, {request['mode']}, {records}"
    return f"{said}; {progress['phase']}: {progress['done']} of {progress['total']}" if progress else said


def show(args: argparse.Namespace, client: Client) -> int:
    """One evaluation in words and tables."""
    found = client.get(f"/evaluations/{quote(args.id, safe='')}")
    if args.json:
        print_json(found)
        return 0
    if not found.get("result"):
        return unfinished("evaluation", found)
    shown(found["result"])
    return 0
