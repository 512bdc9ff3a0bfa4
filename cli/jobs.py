"""`palimpsest jobs` and `palimpsest jobs retry`: list jobs of every kind, and retry a failed one."""

from __future__ import annotations

import argparse

from cli.client import add_client_command
from cli.flags import add_limit_flag
from cli.job_output import failure_reason, format_minute
from cli.terminal import format_list, out, print_json, strip_control_chars
from palimpsest import Client
from service.jobs.job_kinds import JOB_KINDS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = add_client_command(
        commands, "jobs", list_jobs, description="List jobs of every kind, newest first."
    )
    parser.add_argument(
        "--exhausted", action="store_true", help="only jobs that failed after the maximum number of attempts"
    )
    parser.add_argument(
        "--status", help="only jobs with this status: queued, running, failed, cancelled, ..."
    )
    parser.add_argument("--kind", choices=list(JOB_KINDS), help="only jobs of this kind")
    add_limit_flag(parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    retry = add_client_command(verbs, "retry", retry_job, "queue a failed job again with all its attempts")
    retry.add_argument("id", metavar="ID", help="id, as listed by `palimpsest jobs`")


def list_jobs(args: argparse.Namespace, client: Client) -> int:
    """Print the newest jobs."""
    jobs = client.jobs(status=args.status, kind=args.kind, exhausted=args.exhausted or None, limit=args.limit)
    items = [job.raw for job in jobs]
    if args.json:
        print_json(items)
        return 0
    rows = [
        (j["id"], j["status"], j["attempts"], format_minute(j["created"]), failure_reason(j)) for j in items
    ]
    if not rows:
        filtered = args.status or args.kind or args.exhausted
        out.print("No jobs match." if filtered else "There are no jobs.")
        return 0
    out.print(format_list(("id", "status", "attempts", "created (UTC)", "reason"), rows, ("reason",)))
    return 0


def retry_job(args: argparse.Namespace, client: Client) -> int:
    """Queue a failed job again."""
    job = client.retry(args.id)
    if args.json:
        print_json(job.raw)
    else:
        out.print(strip_control_chars(f"{job.id} is {job.status} again."))
    return 0
