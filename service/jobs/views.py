"""Rows as the world sees them: the resources of the HTTP contract, as plain JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import Job, plain
from service.ledger.ledger import moment

Resource = dict[str, Any]

#: a job with one of these statuses is still to end
OPEN = ("queued", "running")
#: what an edit can be; "evaluated" is a dry run that would have landed
EDIT_STATUSES = (*OPEN, "applied", "evaluated", "rejected", "failed", "cancelled", "superseded", "reverted")
#: what a job of any kind can be
STATUSES = (*EDIT_STATUSES, "done")


def resource(session: Session, job: Job) -> Resource:
    """A job of any kind, whole."""
    return several(session, [job])[0]


def several(session: Session, jobs: Sequence[Job]) -> list[Resource]:
    """Jobs of one kind and one model, whole."""
    if jobs and jobs[0].kind == "edit":
        return edits(session, jobs)
    return [WHOLE[job.kind](job) for job in jobs]


def listed(session: Session, jobs: Sequence[Job]) -> list[Resource]:
    """Jobs of one kind and one model as a list shows them."""
    if jobs and jobs[0].kind == "evaluation":
        return [evaluated(job) for job in jobs]
    return several(session, jobs)


def edits(session: Session, jobs: Sequence[Job]) -> list[Resource]:
    """Edits of one model, each with the active edits of its subject."""
    if not jobs:
        return []
    standing = session.execute(
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
    newer = {job.id: next((r.id for r in standing if r.fact_key == job.fact_key), None) for job in jobs}
    newer |= _superseders(session, [j for j in jobs if j.status == "superseded" and newer[j.id] is None])
    return [
        _edit(
            job,
            related=[row.id for row in standing if row.subject == job.subject and row.id != job.id],
            newer=newer[job.id],
        )
        for job in jobs
    ]


def _superseders(session: Session, jobs: Sequence[Job]) -> dict[str, str | None]:
    """What stands in the place of superseded edits whose facts have no active edit: the edit that names it, or the newest of its
    fact, which another names."""
    if not jobs:
        return {}
    landed = session.execute(
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
    found: dict[str, str | None] = {}
    for job in jobs:
        naming = [row.id for row in landed if job.id in (row.result or {}).get("supersedes", ())]
        newest = [row.id for row in landed if row.fact_key == job.fact_key and row.id != job.id]
        found[job.id] = next(iter(naming + newest), None)
    return found


def _edit(job: Job, related: list[str], newer: str | None) -> Resource:
    asked = job.request
    names = ("subject", "prompt", "target_new", "target_true", "method", "hparams", "probes", "guard")
    return {
        **_common(job),
        "result": plain(job.result),
        **{name: asked.get(name) for name in names},
        "objective": asked.get("objective", "write"),
        "on_conflict": asked.get("on_conflict", "report"),
        "dry_run": job.dry_run,
        "origin": asked.get("origin"),
        "version": job.version,
        "reverted_version": job.reverted_version,
        "related": related,
        "superseded_by": newer if job.status == "superseded" else None,
        "links": _links(f"/edits/{job.id}", delta=f"/edits/{job.id}/delta"),
    }


def trace(job: Job) -> Resource:
    return {
        **_common(job),
        "result": plain(job.result),
        "request": job.request,
        "version": job.version,
        "links": _links(f"/trace/{job.id}"),
    }


def evaluation(job: Job) -> Resource:
    """An evaluation with what it found. Its records are not in its row: `request` says how many they are."""
    return {**evaluated(job), "result": plain(job.result)}


def evaluated(job: Job) -> Resource:
    """An evaluation without what it found, which can be megabytes."""
    return {**_common(job), "request": job.request, "links": _links(f"/evaluations/{job.id}")}


def export(job: Job) -> Resource:
    """An export; `result` says what its file is. The file itself is at the address that asked for it."""
    return {
        **_common(job),
        "request": job.request,
        "result": plain(job.result),
        "links": {"self": place(job)},
    }


#: how a job of a kind is shown by itself; edits are shown beside the others of their subjects
WHOLE: dict[str, Callable[[Job], Resource]] = {"trace": trace, "evaluation": evaluation, "export": export}
#: where the jobs of a kind are
PLACES = {"edit": "edits", "trace": "trace", "evaluation": "evaluations"}


def place(job: Job) -> str:
    """Where a job is, or what it made."""
    if job.kind == "export":
        return f"/export?version={job.request['version']}&format={job.request['format']}"
    return f"/{PLACES[job.kind]}/{job.id}"


def summary(job: Job) -> Resource:
    """A job of any kind, without what it was asked and what it found; `links` lead there."""
    return {
        **_common(job),
        "kind": job.kind,
        "dead": job.dead,
        "subject": job.subject,
        "worker": job.worker,
        "request_id": job.request_id,
        "links": {**_places(job), "retry": f"/jobs/{job.id}/retry"},
    }


def _common(job: Job) -> Resource:
    return {
        "id": job.id,
        "status": job.status,
        "progress": job.progress,
        "error": job.error,
        "actor": job.actor,
        "attempts": job.attempts,
        "created": _time(job.created),
        "started": _time(job.started),
        "ended": _time(job.ended),
    }


def _places(job: Job) -> dict[str, str]:
    return {"self": place(job)} if job.kind == "export" else _links(place(job))


def _links(path: str, **more: str) -> dict[str, str]:
    return {"self": path, "events": f"{path}/events", **more}


def _time(at: datetime | None) -> str | None:
    return moment(at) if at else None
