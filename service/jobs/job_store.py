"""A worker's access to the rows of jobs: claim, progress, artifacts, finish, and the commit of an edit.

The id of a job may be delivered twice and to two workers. Each claim increments the row's attempt counter, and every
later write is fenced by it: a worker whose job another worker has claimed can no longer write.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.models import Job, StoredFactors, Worker, now, to_json_value
from service.errors import AttemptsExhausted, Cancelled, Conflict, InvalidInput, LeaseLost, error_document
from service.jobs import artifacts
from service.jobs.broker import ignoring_broker_outage
from service.jobs.views import OPEN_STATUSES, ResourceDict, serialize_job
from service.jobs.worker_session import WorkerSession
from service.kit import crash_points, metrics
from service.kit.ids import prefix_of
from service.kit.search_text import search_text
from service.kit.steps import Progress
from service.ledger import audit, ledger
from service.ledger.audit_coverage import EDIT

log = logging.getLogger(__name__)

PROGRESS_WRITE_INTERVAL = 0.5  #: seconds between two writes of progress to the row
CHANGED_ROW = (
    "its row in the database is not the one that was submitted: submit the edit again, and verify the ledger."
)


@dataclass(frozen=True)
class ClaimedJob:
    """A job that this worker has claimed."""

    id: str
    kind: str
    attempt: int
    request: dict[str, Any]
    actor: str
    subject: str
    fact_key: str | None
    dry_run: bool
    request_id: str = ""  #: of the HTTP request that submitted it


class JobStore:
    """One worker's access to the rows of its model's jobs. Thread-safe.

    When the outcome of a commit is unknown, a method raises Unavailable. It can be called again with the same
    arguments and then finds out whether the commit was carried out.
    """

    def __init__(self, worker_session: WorkerSession, max_attempts: int = 3) -> None:
        self.database = worker_session.database
        self.broker = worker_session.broker
        self.model = worker_session.model
        self.worker = worker_session.worker
        self.max_attempts = max_attempts
        self._worker_session = worker_session
        self._running_jobs = worker_session.running_jobs
        self._progress_written_at: dict[str, float] = {}  # job id -> time of the last write to the row
        self._cancelled_jobs: set[str] = set()

    def claim(self, job_id: str) -> ClaimedJob | None:
        """Claim a queued job, or a running one whose worker died, and count an attempt.

        None when the job cannot be claimed. A cancelled job and one without attempts left are finished instead.
        """
        finished = claimed = None
        with self.database.write_session() as session:
            job = self._lock_row(session, job_id)
            if job is None or job.model != self.model or job.status not in OPEN_STATUSES:
                return None
            if job.status == "running" and not self._is_orphan(session, job):
                return None
            if not _is_intact(session, job):
                finished = _refuse(session, job)
            elif job.cancel_requested:
                job.worker = None
                finished = _finish_row(session, job, "cancelled")
            elif job.attempts >= self.max_attempts:
                finished = _mark_exhausted(session, job)
            else:
                claimed = self._start_attempt(job)
                # the claim proves that this worker is alive, even if its last heartbeat has expired
                session.execute(update(Worker).where(Worker.id == self.worker).values(heartbeat=now()))
            session.flush()
            crash_points.crash_point("start.before_commit")
        crash_points.crash_point("start.after_commit")
        if finished:
            self._publish_end(finished)
        if claimed:
            self._running_jobs.add(claimed.id)
        return claimed

    def _is_orphan(self, session: Session, job: Job) -> bool:
        orphan = select(Job.id).outerjoin(Worker, Worker.id == Job.worker)
        return session.scalar(orphan.where(Job.id == job.id, self._worker_session.orphaned())) is not None

    def _start_attempt(self, job: Job) -> ClaimedJob:
        job.status, job.worker, job.attempts = "running", self.worker, job.attempts + 1
        job.started = job.updated = now()
        job.progress = None
        self._cancelled_jobs.discard(job.id)
        return ClaimedJob(
            job.id,
            job.kind,
            job.attempts,
            job.request,
            job.actor,
            job.subject,
            job.fact_key,
            job.dry_run,
            job.request_id or "",
        )

    def requeue(self, job: ClaimedJob) -> None:
        """Return a job to the queue, without counting the attempt, because this worker stops."""
        finished = None
        with self.database.write_session() as session:
            row = self._row_under_fence(session, job, allow_finished=True)
            if row.status == "running":
                row.status, row.worker, row.attempts, row.updated = "queued", None, job.attempt - 1, now()
                cost = row.cost
            else:
                finished = serialize_job(session, row)
        if finished:
            self._publish_end(finished)
            return
        self._clear_local_state(job.id)
        with ignoring_broker_outage(job.id):
            self.broker.notify(job.id, job.kind, job.actor, cost)

    def forget_locally(self, job: ClaimedJob) -> None:
        """Stop running a job without writing its row. The sweep finds it as an orphan, and it is tried again."""
        self._clear_local_state(job.id)

    def report_progress(self, job: ClaimedJob, progress: Progress) -> None:
        """Publish progress, and write it to the row every PROGRESS_WRITE_INTERVAL seconds.

        Raises LeaseLost when another worker has claimed the job.
        """
        current_time = time.monotonic()
        if (
            current_time - self._progress_written_at.get(job.id, -PROGRESS_WRITE_INTERVAL)
            >= PROGRESS_WRITE_INTERVAL
        ):
            self._progress_written_at[job.id] = current_time
            with self.database.write_session() as session:
                row = self._row_under_fence(session, job)
                row.progress, row.updated = progress.to_json(), now()
                if row.cancel_requested:
                    self._cancelled_jobs.add(job.id)
        self.broker.publish(job.id, "progress", progress.to_json())

    def put_artifact(self, job: ClaimedJob, name: str, data: bytes) -> None:
        """Store an artifact for this and later attempts. Raises LeaseLost when another worker has claimed the job."""
        with self.database.write_session() as session:
            self._row_under_fence(session, job)
            artifacts.put_artifact(session, job.id, name, data)

    def get_artifact(self, job: ClaimedJob, name: str) -> bytes | None:
        """Return an artifact that this or an earlier attempt stored; None when there is none. Reads need no fence."""
        with self.database.read_session() as session:
            return artifacts.get_artifact(session, job.id, name)

    def cancel_requested(self, job: ClaimedJob) -> bool:
        """Return whether the job shall stop.

        The broker delivers a cancellation at once. When it is lost, the next write of progress reads it from the row.
        """
        return job.id in self._cancelled_jobs or self.broker.cancelled(job.id)

    def commit_edit(
        self,
        job: ClaimedJob,
        expected_head: int,
        factors: bytes,
        body: dict[str, Any],
        result: dict[str, Any],
        gate_spaces: Mapping[str, bytes] | None = None,
    ) -> int:
        """Commit an edit: its factors with the spaces of their gates, the next ledger entry and its row, in one
        transaction. Return the version.

        Raises Conflict when the head is not the expected one (evaluate the edit again at the new head), Cancelled when
        a cancellation came first, LeaseLost when another worker has claimed the job, InvalidInput when its row was
        changed in the database. Nothing is written then.
        """
        try:
            with self.database.write_session() as session:
                head = ledger.lock_ledger(session, self.model)
                row = self._row_under_fence(session, job, allow_finished=True)
                if row.status == "running":
                    _check_can_commit(session, row, head, expected_head)
                    for digest, space in (gate_spaces or {}).items():
                        ledger.put_gate_space(session, digest, space)
                    self._insert_edit(session, row, factors, body, result)
                version, finished = row.version, serialize_job(session, row)
                crash_points.crash_point("apply.before_commit")
        except IntegrityError as error:  # the lock prevents this; the constraint guarantees it
            raise Conflict(f"head moved from {expected_head}.") from error
        crash_points.crash_point("apply.after_commit")
        self._publish_end(finished)
        if version is None:
            raise LeaseLost(f"{job.id} has ended without a commit.")
        return version

    def _insert_edit(
        self, session: Session, row: Job, factors: bytes, body: dict[str, Any], result: dict[str, Any]
    ) -> None:
        sha256 = hashlib.sha256(factors).hexdigest()
        fact = {name: row.request.get(name) for name in ("subject", "prompt", "target_new", "target_true")}
        if row.request.get("messages"):
            fact |= {name: row.request[name] for name in ("messages", "continue_final_message")}
        session.add(StoredFactors(edit_id=row.id, data=factors, sha256=sha256))
        body = {**body, **fact, "factors_sha256": sha256, "model": self.model}
        ledger.append_entry(session, self.model, ledger.APPLY, row, row.actor, body)
        _finish_row(session, row, "applied", result)

    def newest_classifier(self, model: str, layer: int) -> bytes | None:
        """Return the artifact of the newest training of a classifier for a layer of a model; None without one."""
        with self.database.read_session() as session:
            return artifacts.newest_classifier(session, model, layer)

    def finish(self, job: ClaimedJob, status: str, result: dict[str, Any] | None = None) -> None:
        """Finish a job that does not change the ledger."""
        self._finish(job, status, result=result)

    def fail(self, job: ClaimedJob, error: Exception) -> None:
        """Finish a job as failed and store the error document; Cancelled finishes it as cancelled."""
        if isinstance(error, Cancelled):
            self._finish(job, "cancelled")
        else:
            self._finish(job, "failed", error=error_document(error))

    def _finish(self, job: ClaimedJob, status: str, **values: Any) -> None:
        with self.database.write_session() as session:
            row = self._row_under_fence(session, job, allow_finished=True)
            if row.status != "running":
                finished = serialize_job(session, row)
            elif _is_intact(session, row):
                finished = _finish_row(session, row, status, **values)
            else:
                finished = _refuse(session, row)
        self._publish_end(finished)

    def _publish_end(self, finished: ResourceDict) -> None:
        self._clear_local_state(finished["id"])
        metrics.JOBS_ENDED.labels(prefix_of(finished["id"]), finished["status"]).inc()
        with ignoring_broker_outage(finished["id"]):
            self.broker.publish(finished["id"], "end", finished, last=True)
        crash_points.crash_point("end.after_publish")

    def _clear_local_state(self, job_id: str) -> None:
        self._progress_written_at.pop(job_id, None)
        self._cancelled_jobs.discard(job_id)
        self._running_jobs.discard(job_id)

    def _lock_row(self, session: Session, job_id: str) -> Job | None:
        return session.scalar(select(Job).where(Job.id == job_id).with_for_update())

    def _row_under_fence(self, session: Session, job: ClaimedJob, allow_finished: bool = False) -> Job:
        """Return the locked row if this attempt still owns it. Raises LeaseLost otherwise.

        `allow_finished` also accepts a row that this attempt has finished, after a commit with an unknown outcome.
        """
        row = self._lock_row(session, job.id)
        owned = row is not None and (row.worker, row.attempts) == (self.worker, job.attempt)
        if (
            row is not None
            and owned
            and (row.status == "running" or (allow_finished and row.status not in OPEN_STATUSES))
        ):
            return row
        self._clear_local_state(job.id)
        raise LeaseLost(f"attempt {job.attempt} at {job.id} is no longer the running attempt.")


def _is_intact(session: Session, job: Job) -> bool:
    """Return whether the row of an edit that has not ended is as it was submitted. Other jobs have no audit records."""
    return job.kind != EDIT or audit.is_intact(session, EDIT, (job.id,))


def _refuse(session: Session, job: Job) -> ResourceDict:
    """Finish a job whose row was changed in the database as failed, without an audit record of the change."""
    log.error("job refused: its row differs from its audit record", extra={"job": job.id})
    job.worker = None
    return _end_row(session, job, "failed", error=error_document(InvalidInput(CHANGED_ROW)))


def _check_can_commit(session: Session, row: Job, head: int, expected_head: int) -> None:
    if not _is_intact(session, row):
        raise InvalidInput(CHANGED_ROW)
    if row.cancel_requested:
        raise Cancelled("the edit was cancelled before it was committed.")
    if head != expected_head:
        raise Conflict(f"head moved from {expected_head} to {head}.", head=head)


def _mark_exhausted(session: Session, job: Job) -> ResourceDict:
    """Finish a job whose workers died in all its attempts. It can be retried by hand."""
    detail = f"its worker died {job.attempts} times while it ran; it is not tried again."
    job.worker, job.exhausted = (
        None,
        True,
    )  # without a worker, so that the fence rejects a worker that was only stalled
    return _finish_row(session, job, "failed", error=error_document(AttemptsExhausted(detail)))


def _finish_row(
    session: Session,
    job: Job,
    status: str,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> ResourceDict:
    """Write the end of a job, and the audit record of an edit. Return the resource to publish after the commit."""
    finished = _end_row(session, job, status, result, error)
    if job.kind == EDIT:
        audit.append(session, EDIT, [(job.id,)])
    return finished


def _end_row(
    session: Session,
    job: Job,
    status: str,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> ResourceDict:
    if job.kind == "trace" and result is not None:
        job.version = result.get("version")
    if job.kind == EDIT and result is not None:
        job.search_text = search_text(job.request, result)
    job.status, job.result, job.error = status, to_json_value(result), error
    job.progress = None
    job.ended = job.updated = now()
    session.flush()
    artifacts.delete_artifacts(session, job)
    return serialize_job(session, job)
