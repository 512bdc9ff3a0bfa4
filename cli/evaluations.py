"""`evaluate --service`: the same as a job of the running service, whose result and report are written here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cli.client import Client
from cli.edits import follow, unfinished
from cli.evaluate import plan_of, read_result, said_of, written
from cli.screen import err, plain
from service.errors import InvalidInput
from service.evaluation.records import rows_of

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
        return unfinished("evaluation", ended)
    written(Path(args.out), [ended["result"], *beside])
    said_of(ended["result"], Path(args.out))
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
