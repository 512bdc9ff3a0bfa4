"""Jobs on the terminal: progress while they run, their failure, times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from cli.hparam_flags import in_flags
from cli.terminal import err, progress_bar, strip_control_chars
from palimpsest import Client, Job

JobJson = Mapping[str, Any]  #: a job as the HTTP API returns it
J = TypeVar("J", bound=Job)


def wait_for_job(client: Client, job: J) -> J:
    """Show the progress of a job until it ends, and return its final state. The job goes on after Ctrl-C."""
    try:
        with progress_bar() as display:
            display.update(job.status, 0, 0)
            return client.wait_for(
                job, on_progress=lambda p: display.update(p.phase, p.done, p.total, p.seconds_left)
            )
    except KeyboardInterrupt:
        err.print(
            strip_control_chars(
                f"{job.id} goes on in the service. See it: palimpsest {_list_of(job)} show {job.id}. Cancel it: palimpsest "
                f"jobs cancel {job.id}"
            )
        )
        raise


def _list_of(job: Job) -> str:
    """Return the command that lists jobs of this kind."""
    return f"{type(job).__name__.lower()}s"


def failure_reason(job: JobJson) -> str | None:
    """Return why a job has no result, in the words of the command line: the detail of its error, or the reason of the
    guard."""
    error, result = job.get("error"), job.get("result")
    detail = error.get("detail") if isinstance(error, Mapping) else None
    reason = result.get("reason") if isinstance(result, Mapping) else None
    return in_flags(text) if isinstance(text := detail or reason, str) else None


def report_job_failure(noun: str, job: JobJson) -> int:
    """Print why a job has no result, and return the exit code."""
    reason = failure_reason(job) or "it has no result."
    err.print(strip_control_chars(f"{noun} {job['id']} is {job['status']}: {reason}"))
    return 1


def format_minute(timestamp: str | None) -> str | None:
    """Return an ISO 8601 time as `YYYY-MM-DD HH:MM`."""
    return timestamp and timestamp[:16].replace("T", " ")
