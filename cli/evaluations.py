"""`palimpsest evaluations` and `palimpsest evaluations show`: list evaluations of the service, and show one."""

from __future__ import annotations

import argparse

from cli.client import add_client_command, add_show_command
from cli.evaluate import print_result_tables
from cli.flags import add_limit_flag
from cli.job_output import JobJson, format_minute, report_job_failure
from cli.terminal import format_list, out, print_json
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = add_client_command(
        commands,
        "evaluations",
        list_evaluations,
        description="List evaluations of the service, newest first.",
    )
    add_limit_flag(parser)
    add_show_command(parser, show_evaluation, "show the result of an evaluation as tables", "evaluations")


def list_evaluations(args: argparse.Namespace, client: Client) -> int:
    """Print the newest evaluations without their results."""
    items = [evaluation.raw for evaluation in client.evaluations(limit=args.limit)]
    if args.json:
        print_json(items)
        return 0
    if not items:
        out.print("There are no evaluations.")
        return 0
    rows = [(e["id"], e["status"], format_minute(e["created"]), describe_request(e)) for e in items]
    out.print(format_list(("id", "status", "created (UTC)", "evaluation"), rows, ("evaluation",)))
    return 0


def describe_request(evaluation: JobJson) -> str:
    """Return what an evaluation measures, and its progress while it runs."""
    request, progress = evaluation["request"], evaluation.get("progress")
    limit, record_count = request.get("limit"), request.get("records")
    source = request.get("dataset") or (
        f"{record_count} records" if isinstance(record_count, int) else "records"
    )
    is_part = limit is not None and not (isinstance(record_count, int) and limit >= record_count)
    records = f"{limit} of {source}" if is_part else source
    description = f"{request['objective']} by {request['method']}, {request['mode']}, {records}"
    return (
        f"{description}; {progress['phase']}: {progress['done']} of {progress['total']}"
        if progress
        else description
    )


def show_evaluation(args: argparse.Namespace, client: Client) -> int:
    """Print the result of an evaluation as sentences and tables."""
    evaluation = client.get_evaluation(args.id).raw
    if args.json:
        print_json(evaluation)
        return 0
    if not evaluation.get("result"):
        return report_job_failure("evaluation", evaluation)
    print_result_tables(evaluation["result"])
    return 0
