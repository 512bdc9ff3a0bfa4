"""What jobs of every kind share: how they are queued, once for each key; shown; and taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session, defer

from service.application.served_model import resident
from service.db.database import Database
from service.db.models import IdempotencyKey, Job, Model, now
from service.errors import InvalidInput, NotFound, QueueFull
from service.jobs import artifacts, views
from service.jobs.broker import Broker, told
from service.jobs.views import Resource
from service.kit import crash_points, metrics
from service.kit.ids import kind_of, new_id, request_id
from service.kit.pagination import check_limit, cursor_after, read_cursor
from service.ledger import ledger
from service.settings import Settings

#: an Idempotency-Key and a fingerprint of the body that came with it
Idempotency = tuple[str, str]

MAX_KEY = 255


class Queue:
    """The rows of jobs, and the bell for whoever does them."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database, self.broker, self.settings = database, broker, settings

    def known(self, actor: str, idempotency: Idempotency | None) -> list[Resource] | None:
        """What this key made before, if anything."""
        if idempotency is None:
            return None
        key, fingerprint = idempotency
        if not 0 < len(key) <= MAX_KEY:
            raise InvalidInput(f"an Idempotency-Key has 1 to {MAX_KEY} characters.", "Idempotency-Key")
        with self.database.read() as session:
            row = session.get(IdempotencyKey, (actor, key))
            if row is None:
                return None
            if row.fingerprint != fingerprint:
                raise InvalidInput(
                    "this Idempotency-Key came with another body before: use a new key for a new request.",
                    "Idempotency-Key",
                )
            jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(row.resources)))}
            return views.several(session, [jobs[job_id] for job_id in row.resources])

    def submit(
        self,
        jobs: list[dict[str, Any]],
        model: Model,
        actor: str,
        idempotency: Idempotency | None,
        max_queued: int | None,
        kept: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> list[Resource]:
        """`kept`: the parts that jobs begin with, by their ids."""
        try:
            with self.database.session() as session:
                if idempotency is not None:
                    remember(session, actor, idempotency, [job["id"] for job in jobs])
                rows = self.add(session, jobs, model, actor, max_queued, kept or {})
                made_resources = views.several(session, rows)
                crash_points.reach("job.before_commit")
        except IntegrityError:  # the same key came in beside us, and was first
            known = self.known(actor, idempotency)
            if known is None:
                raise
            return known
        self.ring(jobs)
        return made_resources

    def add(
        self,
        session: Session,
        jobs: Sequence[dict[str, Any]],
        model: Model,
        actor: str,
        max_queued: int | None,
        kept: Mapping[str, Mapping[str, bytes]],
    ) -> list[Job]:
        """Rows for jobs for which there is room, and the parts that they begin with."""
        self.check_room(session, model, actor, len(jobs), max_queued)
        rows = [Job(**job) for job in jobs]
        session.add_all(rows)
        session.flush()
        for job_id, named in kept.items():
            for name, data in named.items():
                artifacts.put(session, job_id, name, data)
        return rows

    def ring(self, jobs: Sequence[dict[str, Any]]) -> None:
        """The bell for jobs that are committed."""
        crash_points.reach("job.after_commit")
        for job in jobs:
            with told(job["id"]):
                self.broker.announce(job["id"], job["kind"])
        crash_points.reach("job.after_announce")

    def check_room(
        self, session: Session, model: Model, actor: str, more: int, max_queued: int | None
    ) -> None:
        """Room for all, and room for this actor; requests that come at the same moment may find the same room."""
        everyone = and_(Job.model == model.fingerprint, Job.status == "queued")
        limit = self.settings.max_queued if max_queued is None else max_queued
        _check_count(session, everyone, more, self.settings.max_queue, "jobs wait already")
        _check_count(session, and_(everyone, Job.actor == actor), more, limit, "jobs of yours wait already")

    def one(self, kind: str, job_id: str) -> Resource:
        """A job as it stands; NotFound when there is none of this kind by this id."""
        with self.database.read() as session:
            return views.resource(session, find(session, kind, job_id))

    def page(self, kind: str, cursor: str | None, limit: int, **equal: str | None) -> Resource:
        """Jobs of a kind, newest first, whose columns are equal to what is given."""
        check_limit(limit)
        before = read_cursor(cursor, str)
        with self.database.read() as session:
            query = select(Job) if kind != "evaluation" else lean(Job.result)
            query = query.where(Job.model == resident(session).fingerprint, Job.kind == kind)
            for name, value in equal.items():
                if value is not None:
                    query = query.where(getattr(Job, name) == value)
            if before is not None:
                query = query.where(Job.id < before)
            found = list(session.scalars(query.order_by(Job.id.desc()).limit(limit + 1)))
            more = cursor_after(found[limit - 1].id) if len(found) > limit else None
            return {"items": views.listed(session, found[:limit]), "next": more}

    def take_back(self, kind: str, job_id: str, actor: str) -> Resource:
        """Cancel what waits or runs, revert what was applied; harmless when there is nothing to take back."""
        with self.database.session() as session:
            found = find(session, kind, job_id)
            # always before the row of a job, as `Desk.apply` does: no deadlock
            ledger.lock(session, found.model)
            job = hold(session, found)
            before = job.status
            _undo(session, job, actor)
            answer = views.resource(session, job)
            crash_points.reach("revert.before_commit")
        crash_points.reach("revert.after_commit")
        with told(job_id):
            self._tell_undone(before, answer)
        return answer

    def _tell_undone(self, before: str, job: Resource) -> None:
        if before == "queued":
            metrics.JOBS_ENDED.labels(kind_of(job["id"]), job["status"]).inc()
            self.broker.publish(job["id"], "end", job, last=True)
        elif before == "running":
            self.broker.cancel(job["id"])
        elif job["status"] != before:
            self.broker.wake()  # workers move to the new head


def _check_count(session: Session, which: ColumnElement[bool], more: int, limit: int, what: str) -> None:
    already = session.scalar(select(func.count()).select_from(Job).where(which)) or 0
    if already + more > limit:
        raise QueueFull(f"{already} {what} and at most {limit} may: try again later, or with fewer.")


def find(session: Session, kind: str | None, job_id: str) -> Job:
    job = session.get(Job, job_id) if job_id.isascii() and "\x00" not in job_id else None
    if job is None or kind not in (None, job.kind):
        raise NotFound(f"there is no {kind or 'job'} {job_id!r}.")
    return job


def hold(session: Session, job: Job) -> Job:
    """The job as it is now, kept from all others until the transaction ends."""
    row = select(Job).where(Job.id == job.id).with_for_update()
    return session.scalars(row.execution_options(populate_existing=True)).one()


def _undo(session: Session, job: Job, actor: str) -> None:
    """Take a job back, as far as it has come."""
    if job.status == "queued":
        job.status, job.ended, job.updated = "cancelled", now(), now()
        artifacts.drop(session, job)
    elif job.status == "running":
        job.cancel_requested, job.updated = True, now()
    elif job.status in ("applied", "superseded") and job.version is not None:
        ledger.append(session, job.model, ledger.REVERT, job, actor, _revert_body(job))
    session.flush()


def _revert_body(job: Job) -> dict[str, Any]:
    return {
        "subject": job.request["subject"],
        "prompt": job.request["prompt"],
        "applied_version": job.version,
    }


def draft(kind: str, model: Model, request: dict[str, Any], actor: str) -> dict[str, Any]:
    """The row of a new job, before it is written."""
    at = now()
    row = {
        "id": new_id(kind),
        "kind": kind,
        "model": model.fingerprint,
        "status": "queued",
        "request": request,
    }
    asked = {"actor": actor, "request_id": request_id.get() or None}
    return row | asked | {"created": at, "updated": at, "attempts": 0}


def remember(session: Session, actor: str, idempotency: Idempotency, made: Sequence[str]) -> None:
    """What a key has made. Raises IntegrityError when it came in beside us, and was first."""
    key, fingerprint = idempotency
    row = {"resources": list(made), "status_code": 202, "created": now()}
    session.add(IdempotencyKey(actor=actor, key=key, fingerprint=fingerprint, **row))
    session.flush()


def lean(*heavy: InstrumentedAttribute[Any]) -> Select[Job]:
    """Jobs without these columns, for a list: each can be megabytes."""
    return select(Job).options(*map(defer, heavy))
