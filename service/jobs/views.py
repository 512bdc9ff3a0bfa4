"""Rows as the world sees them: the resources of the HTTP contract, as plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import Job, to_json_value
from service.ledger.ledger import iso_utc

ResourceDict = dict[str, Any]

#: a job with one of these statuses is still to end
OPEN_STATUSES = ("queued", "running")
#: what an edit can be; "dry_run_passed" is a dry run that would have landed
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
#: what a job of any kind can be
JOB_STATUSES = (*EDIT_STATUSES, "done")


def serialize_job(session: Session, job: Job) -> ResourceDict:
    """A job of any kind, whole."""
    return serialize_many(session, [job])[0]


def serialize_many(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Jobs of one kind and one model, whole."""
    if jobs and jobs[0].kind == "edit":
        return serialize_edits(session, jobs)
    return [SERIALIZERS[job.kind](job) for job in jobs]


def serialize_list(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Jobs of one kind and one model as a list shows them."""
    if jobs and jobs[0].kind == "evaluation":
        return [evaluation_summary(job) for job in jobs]
    return serialize_many(session, jobs)


def serialize_edits(session: Session, jobs: Sequence[Job]) -> list[ResourceDict]:
    """Edits of one model, each with the active edits of its subject."""
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
    """What stands in the place of superseded edits whose facts have no active edit: the edit that names it, or the newest of its
    fact, which another names."""
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
    names = ("subject", "prompt", "target_new", "target_true", "method", "hparams", "probes", "guard")
    return {
        **_common_fields(job),
        "result": to_json_value(job.result),
        **{name: request.get(name) for name in names},
        "objective": request.get("objective", "write"),
        "on_conflict": request.get("on_conflict", "report"),
        "dry_run": job.dry_run,
        "origin": request.get("origin"),
        "version": job.version,
        "reverted_version": job.reverted_version,
        "related": related,
        "superseded_by": superseded_by if job.status == "superseded" else None,
        "links": _links(f"/edits/{job.id}", delta=f"/edits/{job.id}/delta"),
    }


def serialize_trace(job: Job) -> ResourceDict:
    return {
        **_common_fields(job),
        "result": to_json_value(job.result),
        "request": job.request,
        "version": job.version,
        "links": _links(f"/trace/{job.id}"),
    }


def serialize_evaluation(job: Job) -> ResourceDict:
    """An evaluation with what it found. Its records are not in its row: `request` says how many they are."""
    return {**evaluation_summary(job), "result": to_json_value(job.result)}


def evaluation_summary(job: Job) -> ResourceDict:
    """An evaluation without what it found, which can be megabytes."""
    return {**_common_fields(job), "request": job.request, "links": _links(f"/evaluations/{job.id}")}


def serialize_export(job: Job) -> ResourceDict:
    """An export; `result` says what its file is. The file itself is at the address that asked for it."""
    return {
        **_common_fields(job),
        "request": job.request,
        "result": to_json_value(job.result),
        "links": {"self": job_path(job)},
    }


#: how a job of a kind is shown by itself; edits are shown beside the others of their subjects
SERIALIZERS: dict[str, Callable[[Job], ResourceDict]] = {
    "trace": serialize_trace,
    "evaluation": serialize_evaluation,
    "export": serialize_export,
}
#: where the jobs of a kind are
PATHS = {"edit": "edits", "trace": "trace", "evaluation": "evaluations"}


def job_path(job: Job) -> str:
    """Where a job is, or what it made."""
    if job.kind == "export":
        return f"/export?version={job.request['version']}&format={job.request['format']}"
    return f"/{PATHS[job.kind]}/{job.id}"


def job_summary(job: Job) -> ResourceDict:
    """A job of any kind, without what it was asked and what it found; `links` lead there."""
    return {
        **_common_fields(job),
        "kind": job.kind,
        "dead": job.dead,
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
        "attempts": job.attempts,
        "created": _iso_or_none(job.created),
        "started": _iso_or_none(job.started),
        "ended": _iso_or_none(job.ended),
    }


def _job_links(job: Job) -> dict[str, str]:
    return {"self": job_path(job)} if job.kind == "export" else _links(job_path(job))


def _links(path: str, **more: str) -> dict[str, str]:
    return {"self": path, "events": f"{path}/events", **more}


def _iso_or_none(at: datetime | None) -> str | None:
    return iso_utc(at) if at else None
