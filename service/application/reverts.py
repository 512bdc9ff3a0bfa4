"""Cancel or revert jobs within one transaction, and announce it after the commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from service.db.models import Job, Model, now
from service.errors import InvalidInput, NotFound
from service.jobs import artifacts
from service.ledger import audit, ledger
from service.ledger.audit_coverage import EDIT
from service.schemas import RevertRequest

MAX_REVERTED = 2000  #: edits of one transaction; 1,000 take about six seconds on two slow cores
ROWS_AT_ONCE = 500  #: edits that one statement locks, or whose requests it reads


@dataclass
class JobChanges:
    """The ids of jobs, by what was done with them."""

    reverted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)  #: that waited
    stopping: list[str] = field(default_factory=list)  #: that run, and end soon
    unchanged: list[str] = field(default_factory=list)


def cancel_or_revert(session: Session, jobs: Sequence[Job], actor: str) -> JobChanges:
    """Cancel or revert locked jobs of one kind and one model, each depending on its status. The caller holds the
    ledger's lock."""
    changes, reverted = JobChanges(), list[Job]()
    for job in jobs:
        if job.status == "queued":
            job.status, job.ended, job.updated, job.cancelled_by = "cancelled", now(), now(), actor
            artifacts.delete_artifacts(session, job)
            changes.cancelled.append(job.id)
        elif job.status == "running" and not job.cancel_requested:
            job.cancel_requested, job.updated, job.cancelled_by = True, now(), actor
            changes.stopping.append(job.id)
        elif job.status in ("applied", "superseded") and job.version is not None:
            reverted.append(job)
        else:
            changes.unchanged.append(job.id)
    if jobs and jobs[0].kind == EDIT:
        audit.append(session, EDIT, [(job_id,) for job_id in changes.cancelled])
    if reverted:
        bodies = dict(_revert_bodies(session, reverted))
        entries = [(job, bodies[job.id]) for job in reverted]
        ledger.append_entries(session, reverted[0].model, ledger.REVERT, entries, actor)
        changes.reverted = [job.id for job in reverted]
    session.flush()
    return changes


def lock_edits(session: Session, model: Model, request: RevertRequest) -> list[Job]:
    """Return the edits that a request selects, locked until the transaction ends, in the order of their ids, without
    their requests and results. Raises NotFound if one of them, or the batch, does not exist."""
    edits = select(Job.id).where(Job.model == model.fingerprint, Job.kind == EDIT)
    if request.edits is None:
        ids = list(session.scalars(edits.where(Job.batch == request.batch).order_by(Job.id)))
    else:
        ids = sorted(set(request.edits))
    if len(ids) > MAX_REVERTED:
        raise InvalidInput(
            f"the batch has {len(ids)} edits, and {MAX_REVERTED} can be reverted together: give their ids, in several requests.",
            "batch",
        )
    found: list[Job] = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = select(Job).where(Job.id.in_(ids[start : start + ROWS_AT_ONCE]), Job.kind == EDIT)
        rows = rows.where(Job.model == model.fingerprint).order_by(Job.id).with_for_update()
        rows = rows.options(defer(Job.request), defer(Job.result))
        found += session.scalars(rows.execution_options(populate_existing=True))
    if request.edits is None and not found:
        raise NotFound(f"no edit has the batch {request.batch!r}: check its name with GET /edits.")
    if missing := set(ids) - {job.id for job in found}:
        raise NotFound(
            f"there is no edit {min(missing)!r}: nothing was reverted. Leave it out, or correct its id."
        )
    return found


def _revert_bodies(session: Session, jobs: Sequence[Job]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the body of the entry that reverts each edit. A request, of up to a megabyte, is not kept."""
    ids = [job.id for job in jobs]
    for start in range(0, len(ids), ROWS_AT_ONCE):
        rows = select(Job.id, Job.request, Job.version).where(Job.id.in_(ids[start : start + ROWS_AT_ONCE]))
        for row in session.execute(rows.execution_options(yield_per=16)):
            fact = {name: row.request[name] for name in ("subject", "prompt")}
            yield row.id, {**fact, "applied_version": row.version}
