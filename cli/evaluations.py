"""`evaluate --service`, `evaluations`, `evaluations show`: evaluations as jobs of the running service."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli.client import Client
from cli.edits import fetch_newest, format_minute, report_job_failure, wait_for_job
from cli.evaluate import build_plan, load_result, print_result, write_report
from cli.evaluate import print_result_tables as print_tables
from cli.terminal import err, format_list, out, print_json, strip_control_chars
from service.datasets.loading import read_rows
from service.errors import InvalidInput

#: what the service does not do: it takes records in the seed's order, and has plain texts of its own
LOCAL_ONLY_OPTIONS = ("half", "distinct", "texts")


def submit_evaluation(args: argparse.Namespace, client: Client) -> int:
    """Ask for an evaluation, follow it to its end, write result and report, and say what came of it."""
    body = evaluation_request_body(args)
    comparisons = [load_result(Path(name)) for name in args.beside or ()]
    evaluation = client.post("/evaluations", body)
    err.print(
        strip_control_chars(f"{evaluation['id']} goes on in the service, also when this command is stopped.")
    )
    job = wait_for_job(client, evaluation)
    if job["status"] != "done":
        if args.json:
            print_json(job)
        return report_job_failure("evaluation", job)
    write_report(Path(args.out), [job["result"], *comparisons])
    print_result(job["result"], Path(args.out), args.json)
    return 0


def evaluation_request_body(args: argparse.Namespace) -> dict[str, Any]:
    """The body of POST /evaluations."""
    if unsupported := [
        name for name in LOCAL_ONLY_OPTIONS if getattr(args, name) not in (None, False, "all")
    ]:
        raise InvalidInput(
            f"--{unsupported[0]} is for an evaluation that is computed here: leave it or --service out."
        )
    body = build_plan(args).model_dump(mode="json", exclude_unset=True)
    if args.limit is not None:
        body["limit"] = args.limit
    source = {"dataset": "facts"} if args.source == "facts" else {"records": read_rows(Path(args.source))}
    return body | source


def list_evaluations(args: argparse.Namespace, client: Client) -> int:
    """The newest evaluations, without what they found."""
    items = fetch_newest(client, "/evaluations", args.limit)
    if args.json:
        print_json(items)
        return 0
    if not items:
        out.print("There are no evaluations.")
        return 0
    rows = [(e["id"], e["status"], format_minute(e["created"]), describe_request(e)) for e in items]
    out.print(format_list(("id", "status", "when (UTC)", "what"), rows, ("what",)))
    return 0


def describe_request(evaluation: dict[str, Any]) -> str:
    """What an evaluation is of, and how far it is while it runs."""
    request, progress = evaluation["request"], evaluation.get("progress")
    limit, record_count = request.get("limit"), request.get("records")
    source = request.get("dataset") or (
        f"{record_count} records" if isinstance(record_count, int) else "records"
    )
    records = source if limit is None else f"{limit} of {source}"
    description = f"{request['objective']} by {request['method']}, {request['mode']}, {records}"
    return (
        f"{description}; {progress['phase']}: {progress['done']} of {progress['total']}"
        if progress
        else description
    )


def show_evaluation(args: argparse.Namespace, client: Client) -> int:
    """One evaluation in words and tables."""
    evaluation = client.get(f"/evaluations/{quote(args.id, safe='')}")
    if args.json:
        print_json(evaluation)
        return 0
    if not evaluation.get("result"):
        return report_job_failure("evaluation", evaluation)
    print_tables(evaluation["result"])
    return 0
