"""The resources of the HTTP API, built from rows as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import Job, to_json_value
from service.jobs.job_kinds import JOB_KINDS
from service.ledger.ledger import iso_utc

ResourceDict = dict[str, Any]

#: statuses of jobs that have not ended
OPEN_STATUSES = ("queued", "running")
#: statuses of edits; "dry_run_passed" is a dry run that passed its guard
EDIT_STATUSES = (
    *OPEN_STATUSES,
    "applied",
    "dry_run_passed",
    "rejected",
    "failed",
    "cancelled",
    "superseded",
    "reverted",
)
#: statuses of jobs of all kinds
JOB_STATUSES = (*EDIT_STATUSES, "done")


def serialize_job(session: Session, job: Job) -> ResourceDict:
    """Return the full resource of a job of any kind."""
    return serialize_many(session, [job])[0]


def serialize_many(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return the full resources of jobs of one kind and one model."""
    return list(JOB_KINDS[jobs[0].kind].serialize(session, jobs)) if jobs else []


def serialize_list(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return the resources of jobs of one kind and one model as a list shows them."""
    return list(JOB_KINDS[jobs[0].kind].serialize_list(session, jobs)) if jobs else []


def serialize_edits(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return edits of one model, each with the other active edits of its subject."""
    if not jobs:
        return []
    active_edits = session.execute(
        select(Job.id, Job.subject, Job.fact_key)
        .where(
            Job.model == jobs[0].model,
            Job.kind == "edit",
            Job.status == "applied",
            Job.version.is_not(None),
            Job.subject.in_({job.subject for job in jobs}),
        )
        .order_by(Job.id)
    ).all()
    superseded_by = {
        job.id: next((r.id for r in active_edits if r.fact_key == job.fact_key), None) for job in jobs
    }
    superseded_by |= _superseders(
        session, [j for j in jobs if j.status == "superseded" and superseded_by[j.id] is None]
    )
    return [
        _serialize_edit(
            job,
            related=[row.id for row in active_edits if row.subject == job.subject and row.id != job.id],
            superseded_by=superseded_by[job.id],
        )
        for job in jobs
    ]


def _superseders(session: Session, jobs: Sequence[Job]) -> dict[str, str | None]:
    """Return, for superseded edits whose facts have no active edit, the id of the edit that supersedes each.

    This is the edit that names it in `supersedes`, or else the newest committed edit of the same fact.
    """
    if not jobs:
        return {}
    committed = session.execute(
        select(Job.id, Job.fact_key, Job.result)
        .where(
            Job.model == jobs[0].model,
            Job.kind == "edit",
            Job.subject.in_({job.subject for job in jobs}),
            Job.version.is_not(None),
            Job.reverted_version.is_(None),
        )
        .order_by(Job.version.desc())
    ).all()
    superseders: dict[str, str | None] = {}
    for job in jobs:
        naming = [row.id for row in committed if job.id in (row.result or {}).get("supersedes", ())]
        newest = [row.id for row in committed if row.fact_key == job.fact_key and row.id != job.id]
        superseders[job.id] = next(iter(naming + newest), None)
    return superseders


def _serialize_edit(job: Job, related: list[str], superseded_by: str | None) -> ResourceDict:
    request = job.request
    names = (
        "subject",
        "prompt",
        "messages",
        "target_new",
        "target_true",
        "separator",
        "form",
        "method",
        "hparams",
        "probes",
        "guard",
    )
    return {
        **_common_fields(job),
        "result": to_json_value(job.result),
        **{name: request.get(name) for name in names},
        "continue_final_message": request.get("continue_final_message", False),
        "objective": request.get("objective", "write"),
        "on_conflict": request.get("on_conflict", "report"),
        "batch": job.batch,
        "dry_run": job.dry_run,
        "origin": request.get("origin"),
        "version": job.version,
        "reverted_version": job.reverted_version,
        "related": related,
        "superseded_by": superseded_by if job.status == "superseded" else None,
        "links": _links(f"/edits/{job.id}", delta=f"/edits/{job.id}/delta"),
    }


def serialize_traces(_: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return traces with their requests and results."""
    return [
        {
            **_common_fields(job),
            "result": to_json_value(job.result),
            "request": job.request,
            "version": job.version,
            "links": _job_links(job),
        }
        for job in jobs
    ]


def serialize_evaluations(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return evaluations with their results.

    The records are an artifact, not a part of the row: `request` states their number.
    """
    summaries = summarize_evaluations(session, jobs)
    return [
        {**summary, "result": to_json_value(job.result)} for summary, job in zip(summaries, jobs, strict=True)
    ]


def summarize_evaluations(_: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return evaluations without their results, which can be megabytes."""
    return [{**_common_fields(job), "request": job.request, "links": _job_links(job)} for job in jobs]


def serialize_trainings(_: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return trainings; `result` has the figures of what was trained."""
    return [
        {
            **_common_fields(job),
            "request": job.request,
            "result": to_json_value(job.result),
            "links": _job_links(job),
        }
        for job in jobs
    ]


def serialize_exports(_: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Return exports; `result` describes the file."""
    return [
        {
            **_common_fields(job),
            "request": job.request,
            "result": to_json_value(job.result),
            "links": _links(job_path(job), file=f"{job_path(job)}/file"),
        }
        for job in jobs
    ]


def job_path(job: Job) -> str:
    """Return the path of a job's resource."""
    return f"{JOB_KINDS[job.kind].path}/{job.id}"


def job_summary(job: Job) -> ResourceDict:
    """Return a job of any kind without its request and result; `links` lead to them."""
    return {
        **_common_fields(job),
        "kind": job.kind,
        "exhausted": job.exhausted,
        "subject": job.subject,
        "worker": job.worker,
        "request_id": job.request_id,
        "links": {**_job_links(job), "retry": f"/jobs/{job.id}/retry"},
    }


def _common_fields(job: Job) -> ResourceDict:
    return {
        "id": job.id,
        "status": job.status,
        "progress": job.progress,
        "error": job.error,
        "actor": job.actor,
        "cancelled_by": job.cancelled_by if job.status in ("running", "cancelled") else None,
        "attempts": job.attempts,
        "created": _iso_or_none(job.created),
        "started": _iso_or_none(job.started),
        "ended": _iso_or_none(job.ended),
    }


def _job_links(job: Job) -> dict[str, str]:
    return _links(job_path(job))


def _links(path: str, **more: str) -> dict[str, str]:
    return {"self": path, "events": f"{path}/events", **more}


def _iso_or_none(at: datetime | None) -> str | None:
    return iso_utc(at) if at else None
