"""`palimpsest jobs`, `jobs cancel` and `jobs retry`: list jobs of every kind, cancel an open one, retry a failed
one."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cli.client import add_client_command
from cli.flags import add_limit_flag
from cli.job_output import failure_reason, format_minute
from cli.terminal import format_list, out, print_json, strip_control_chars
from palimpsest import Client, Job
from service.errors import InvalidInput
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
    cancel = add_client_command(verbs, "cancel", cancel_job, "cancel a job that is queued or running")
    for verb in (cancel, retry):
        verb.add_argument("id", metavar="ID", help="id, as listed by `palimpsest jobs`")


def list_jobs(args: argparse.Namespace, client: Client) -> int:
    """Print the newest jobs."""
    jobs = client.jobs(status=args.status, kind=args.kind, exhausted=args.exhausted or None, limit=args.limit)
    items = [job.raw for job in jobs]
    if args.json:
        print_json(items)
        return 0
    rows = [
        (j["id"], j["status"], j["attempts"], format_minute(j["created"]), j["subject"], failure_reason(j))
        for j in items
    ]
    if not rows:
        filtered = args.status or args.kind or args.exhausted
        out.print("No jobs match." if filtered else "There are no jobs.")
        return 0
    columns = ("id", "status", "attempts", "created (UTC)", "subject", "reason")
    out.print(format_list(columns, rows, ("subject", "reason")))
    return 0


def cancel_job(args: argparse.Namespace, client: Client) -> int:
    """Cancel an open job of any kind. An edit that is applied already is not reverted."""
    job = find_job(client, args.id)
    if job.finished:
        revert = f" Revert it: palimpsest revert {job.id}" if job.status == "applied" else ""
        raise InvalidInput(
            f"{job.id} is {job.status}: only a queued or running job can be cancelled.{revert}"
        )
    job = client.cancel(job, wait=False)
    if args.json:
        print_json(job.raw)
    else:
        said = "is cancelled" if job.status == "cancelled" else "is cancelled before its next step"
        out.print(
            strip_control_chars(
                f"{job.id} {said if not job.finished or job.status == 'cancelled' else f'is {job.status}'}."
            )
        )
    return 0


def find_job(client: Client, id: str) -> Job:
    """Return a job of any kind. The beginning of its id names the kind."""
    getters: dict[str, Callable[[str], Job]] = {
        "edit": client.get_edit,
        "trace": client.get_trace,
        "export": client.get_export,
        "evaluation": client.get_evaluation,
    }
    prefix = id.partition("_")[0]
    kind = next((kind.name for kind in JOB_KINDS.values() if kind.id_prefix == prefix), None)
    if kind is None:
        raise InvalidInput(f"{id!r} is no id of a job: `palimpsest jobs` lists them.")
    return getters[kind](id)


def retry_job(args: argparse.Namespace, client: Client) -> int:
    """Queue a failed job again."""
    job = client.retry(args.id)
    if args.json:
        print_json(job.raw)
    else:
        out.print(strip_control_chars(f"{job.id} is {job.status} again."))
    return 0
