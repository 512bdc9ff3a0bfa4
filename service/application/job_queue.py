"""Operations on jobs of every kind: submit with an idempotency key, list, cancel, revert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session, defer

from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.costs import job_cost
from service.application.reverts import cancel_or_revert, lock_edits
from service.application.served_model import get_served_model
from service.db.database import Database
from service.db.models import IdempotencyKey, Job, Model, now
from service.errors import Conflict, InvalidInput, NotFound, QueueFull
from service.jobs import artifacts, views
from service.jobs.broker import Broker, ignoring_broker_outage
from service.jobs.job_kinds import JOB_KINDS
from service.jobs.page import read_page
from service.jobs.views import ResourceDict
from service.kit import crash_points, metrics
from service.kit.ids import new_id, prefix_of, request_id
from service.kit.pagination import decode_cursor, encode_cursor, validate_limit
from service.ledger import audit, ledger
from service.ledger.audit_coverage import EDIT
from service.schemas import RevertRequest
from service.settings import Settings

#: an Idempotency-Key and the fingerprint of its request body
Idempotency = tuple[str, str]

MAX_IDEMPOTENCY_KEY_LENGTH = 255


class JobQueue:
    """Inserts and reads the rows of jobs, and notifies workers."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database, self.broker, self.settings = database, broker, settings

    def find_by_idempotency_key(
        self, actor: str, idempotency: Idempotency | None
    ) -> list[ResourceDict] | None:
        """Return the jobs that an earlier request with this key created; None when there was none."""
        if idempotency is None:
            return None
        key, fingerprint = idempotency
        if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY_LENGTH:
            raise InvalidInput(
                f"an Idempotency-Key has 1 to {MAX_IDEMPOTENCY_KEY_LENGTH} characters.", "Idempotency-Key"
            )
        with self.database.read_session() as session:
            row = session.get(IdempotencyKey, (actor, key))
            if row is None:
                return None
            if row.fingerprint != fingerprint:
                raise InvalidInput(
                    "this Idempotency-Key was used with another request body: use a new key for a new request.",
                    "Idempotency-Key",
                )
            jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(row.resources)))}
            if len(jobs) < len(set(row.resources)):
                raise Conflict(
                    "the jobs that this Idempotency-Key created were deleted when their retention ended: use a new key."
                )
            return views.serialize_many(session, [jobs[job_id] for job_id in row.resources])

    def submit(
        self,
        jobs: list[dict[str, Any]],
        model: Model,
        actor: str,
        idempotency: Idempotency | None,
        limits: CallerLimits = DEFAULT_LIMITS,
        initial_artifacts: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> list[ResourceDict]:
        """Insert jobs, commit and notify. Return their resources.

        `initial_artifacts` maps job ids to the artifacts that are stored with the job, by name.
        """
        try:
            with self.database.write_session() as session:
                if idempotency is not None:
                    save_idempotency_key(session, actor, idempotency, [job["id"] for job in jobs])
                rows = self.insert_jobs(session, jobs, model, actor, limits, initial_artifacts or {})
                created = views.serialize_many(session, rows)
                crash_points.crash_point("job.before_commit")
        except IntegrityError:  # a concurrent request with the same key committed first
            previous = self.find_by_idempotency_key(actor, idempotency)
            if previous is None:
                raise
            return previous
        self.notify_workers(jobs)
        return created

    def insert_jobs(
        self,
        session: Session,
        jobs: Sequence[dict[str, Any]],
        model: Model,
        actor: str,
        limits: CallerLimits,
        initial_artifacts: Mapping[str, Mapping[str, bytes]],
    ) -> list[Job]:
        """Insert the rows of jobs and their initial artifacts. Raises QueueFull when a limit is exceeded."""
        self.check_queue_limits(session, model, actor, len(jobs), limits)
        for job in jobs:
            job["cost"] /= limits.weight
        rows = [Job(**job) for job in jobs]
        session.add_all(rows)
        session.flush()
        for job_id, artifacts_of_job in initial_artifacts.items():
            for name, data in artifacts_of_job.items():
                artifacts.put_artifact(session, job_id, name, data)
        audit.append(session, EDIT, [(row.id,) for row in rows if row.kind == EDIT])
        return rows

    def notify_workers(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Notify workers of committed jobs."""
        crash_points.crash_point("job.after_commit")
        for job in jobs:
            with ignoring_broker_outage(job["id"]):
                self.broker.notify(job["id"], job["kind"], job["actor"], job["cost"])
        crash_points.crash_point("job.after_announce")

    def check_queue_limits(
        self, session: Session, model: Model, actor: str, new_jobs: int, limits: CallerLimits
    ) -> None:
        """Raise QueueFull when the jobs would exceed the limit of the queue or that of the actor.

        The check does not lock: concurrent submissions can exceed a limit by their own number.
        """
        everyone = and_(Job.model == model.fingerprint, Job.status == "queued")
        limit = limits.max_queued or self.settings.max_queued_per_key
        _check_limit(session, everyone, new_jobs, self.settings.max_queue, "jobs are queued")
        _check_limit(session, and_(everyone, Job.actor == actor), new_jobs, limit, "of your jobs are queued")

    def get(self, kind: str, job_id: str) -> ResourceDict:
        """Return a job. Raises NotFound when there is none of this kind with this id."""
        with self.database.read_session() as session:
            return views.serialize_job(session, get_job(session, kind, job_id))

    def page(
        self, kind: str, cursor: str | None, limit: int, conditions: Sequence[ColumnElement[bool]] = ()
    ) -> ResourceDict:
        """Return {"items": jobs of a kind, newest first, "next": cursor or None}; `conditions` select them."""
        validate_limit(limit)
        before = decode_cursor(cursor, str)
        with self.database.read_session() as session:
            shows_result = not JOB_KINDS[kind].list_serializer
            query = select(Job) if shows_result else without_columns(Job.result)
            query = query.where(
                Job.model == get_served_model(session).fingerprint, Job.kind == kind, *conditions
            )
            if before is not None:
                query = query.where(Job.id < before)
            columns = (Job.request, Job.result) if shows_result else (Job.request,)
            jobs, has_more = read_page(session, query.order_by(Job.id.desc()), limit, columns)
            next_cursor = encode_cursor(jobs[-1].id) if has_more else None
            return {"items": views.serialize_list(session, jobs), "next": next_cursor}

    def cancel_or_revert(self, kind: str, job_id: str, actor: str) -> ResourceDict:
        """Cancel a job that is queued or running, or revert an applied edit. Has no effect on any other job."""
        with self.database.write_session() as session:
            unlocked = get_job(session, kind, job_id)
            # the ledger is locked before the row, as in JobStore.commit_edit: no deadlock
            ledger.lock_ledger(session, unlocked.model)
            job = lock_job(session, unlocked)
            previous_status = job.status
            cancel_or_revert(session, [job], actor)
            view = views.serialize_job(session, job)
            crash_points.crash_point("revert.before_commit")
        crash_points.crash_point("revert.after_commit")
        with ignoring_broker_outage(job_id):
            self._announce(previous_status, view)
        return view

    def revert_edits(self, request: RevertRequest, actor: str) -> ResourceDict:
        """Revert several edits of the served model in one transaction, and cancel those that are not applied yet.

        Return the newest version and the ids of the edits by what was done with them. Raises NotFound, with nothing
        changed, if one of them does not exist.
        """
        with self.database.write_session() as session:
            model = get_served_model(session)
            # the ledger is locked before the rows, as in JobStore.commit_edit: no deadlock
            ledger.lock_ledger(session, model.fingerprint)
            changes = cancel_or_revert(session, lock_edits(session, model, request), actor)
            head = ledger.head(session, model.fingerprint)
            crash_points.crash_point("revert.before_commit")
        crash_points.crash_point("revert.after_commit")
        for job_id in changes.cancelled:
            with ignoring_broker_outage(job_id):
                self._announce("queued", self.get(EDIT, job_id))
        for job_id in changes.stopping:
            with ignoring_broker_outage(job_id):
                self.broker.cancel(job_id)
        if changes.reverted:
            with ignoring_broker_outage(changes.reverted[0]):
                self.broker.wake()  # workers follow the new head
        return {
            "version": head,
            "reverted": changes.reverted,
            "cancelled": sorted([*changes.cancelled, *changes.stopping]),
            "unchanged": changes.unchanged,
        }

    def _announce(self, previous_status: str, job: ResourceDict) -> None:
        if previous_status == "queued":
            metrics.JOBS_ENDED.labels(prefix_of(job["id"]), job["status"]).inc()
            self.broker.publish(job["id"], "end", job, last=True)
        elif previous_status == "running":
            self.broker.cancel(job["id"])
        elif job["status"] != previous_status:
            self.broker.wake()  # workers follow the new head


def _check_limit(
    session: Session, condition: ColumnElement[bool], new_jobs: int, limit: int, description: str
) -> None:
    waiting = session.scalar(select(func.count()).select_from(Job).where(condition)) or 0
    if waiting + new_jobs > limit:
        raise QueueFull(f"{waiting} {description}, at most {limit} can be: retry later or submit fewer.")


def get_job(session: Session, kind: str | None, job_id: str) -> Job:
    """Return a job, of any kind when `kind` is None. Raises NotFound."""
    job = session.get(Job, job_id) if job_id.isascii() and "\x00" not in job_id else None
    if job is None or kind not in (None, job.kind):
        raise job_not_found(kind, job_id)
    return job


def job_not_found(kind: str | None, job_id: str) -> NotFound:
    """Return the error for an id without a job."""
    return NotFound(
        f"there is no {kind or 'job'} {job_id!r}: the id is wrong, or the job was deleted when its retention ended."
    )


def lock_job(session: Session, job: Job) -> Job:
    """Return the current row of a job, locked until the transaction ends. Raises NotFound if it was deleted."""
    row = select(Job).where(Job.id == job.id).with_for_update()
    locked = session.scalars(row.execution_options(populate_existing=True)).one_or_none()
    if locked is None:
        raise job_not_found(job.kind, job.id)
    return locked


def new_job_row(kind: str, model: Model, request: dict[str, Any], actor: str) -> dict[str, Any]:
    """Return the columns of a new job. Nothing is written."""
    created = now()
    row = {
        "id": new_id(JOB_KINDS[kind].id_prefix),
        "kind": kind,
        "model": model.fingerprint,
        "status": "queued",
        "request": request,
        "cost": job_cost(kind, request),
    }
    origin = {"actor": actor, "request_id": request_id.get() or None}
    return row | origin | {"created": created, "updated": created, "attempts": 0}


def save_idempotency_key(
    session: Session, actor: str, idempotency: Idempotency, job_ids: Sequence[str]
) -> None:
    """Store the jobs of an idempotency key. Raises IntegrityError when a concurrent request with it committed first."""
    key, fingerprint = idempotency
    row = {"resources": list(job_ids), "status_code": 202, "created": now()}
    session.add(IdempotencyKey(actor=actor, key=key, fingerprint=fingerprint, **row))
    session.flush()


def without_columns(*columns: InstrumentedAttribute[Any]) -> Select[Job]:
    """Return a query for jobs that does not load these columns, which can be megabytes each."""
    return select(Job).options(*map(defer, columns))
