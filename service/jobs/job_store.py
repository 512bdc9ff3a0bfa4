"""What a worker may do with the rows of jobs.

A job may be delivered twice and to two workers. Each start counts an attempt, and every later write is fenced by it:
a worker whose job was taken over can no longer write anything.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.models import Job, StoredFactors, Worker, now, to_json_value
from service.errors import AttemptsExhausted, Cancelled, Conflict, LeaseLost, error_document
from service.jobs import artifacts
from service.jobs.broker import ignoring_broker_outage
from service.jobs.views import OPEN_STATUSES, ResourceDict, serialize_job
from service.jobs.worker_session import WorkerSession
from service.kit import crash_points, metrics
from service.kit.ids import prefix_of
from service.kit.steps import Progress
from service.ledger import ledger

log = logging.getLogger(__name__)

PROGRESS_WRITE_INTERVAL = 0.5  #: progress is written to the row at most this often


@dataclass(frozen=True)
class ClaimedJob:
    """A job that this worker has begun."""

    id: str
    kind: str
    attempt: int
    request: dict[str, Any]
    actor: str
    subject: str
    fact_key: str | None
    dry_run: bool
    request_id: str = ""  #: of the HTTP request that asked for it


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
        """Begin a job that waits, or whose worker died. None when there is nothing to do for this worker."""
        finished = claimed = None
        with self.database.write_session() as session:
            job = self._lock_row(session, job_id)
            if job is None or job.model != self.model or job.status not in OPEN_STATUSES:
                return None
            if job.status == "running" and not self._is_orphan(session, job):
                return None
            if job.cancel_requested:
                job.worker = None
                finished = _finish_row(session, job, "cancelled")
            elif job.attempts >= self.max_attempts:
                finished = _mark_exhausted(session, job)
            else:
                claimed = self._start_attempt(job)
                # who begins a job lives, also when it slept so long that its heartbeat says otherwise
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
        """Put a job back that this worker cannot finish because it stops; the attempt does not count."""
        finished = None
        with self.database.write_session() as session:
            row = self._row_under_fence(session, job, allow_finished=True)
            if row.status == "running":
                row.status, row.worker, row.attempts, row.updated = "queued", None, job.attempt - 1, now()
            else:
                finished = serialize_job(session, row)
        if finished:
            self._publish_end(finished)
            return
        self._clear_local_state(job.id)
        with ignoring_broker_outage(job.id):
            self.broker.notify(job.id, job.kind)

    def forget_locally(self, job: ClaimedJob) -> None:
        """This worker does a job no longer and cannot write so: the sweep finds it, and it is tried again."""
        self._clear_local_state(job.id)

    def report_progress(self, job: ClaimedJob, progress: Progress) -> None:
        """Tell the listeners at once, and the row every now and then. Raises LeaseLost when the job was taken over."""
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
        """Keep a part of a job for whoever goes on with it. Raises LeaseLost when the job was taken over."""
        with self.database.write_session() as session:
            self._row_under_fence(session, job)
            artifacts.put_artifact(session, job.id, name, data)

    def get_artifact(self, job: ClaimedJob, name: str) -> bytes | None:
        """A part of a job, kept by this attempt or by one before it. What reads needs no fence."""
        with self.database.read_session() as session:
            return artifacts.get_artifact(session, job.id, name)

    def cancel_requested(self, job: ClaimedJob) -> bool:
        """Whether somebody wants this job to stop: known at once from the broker, in any case from the row."""
        return job.id in self._cancelled_jobs or self.broker.cancelled(job.id)

    def commit_edit(
        self,
        job: ClaimedJob,
        expected_head: int,
        factors: bytes,
        body: dict[str, Any],
        result: dict[str, Any],
    ) -> int:
        """Land an edit: its factors, the next entry of the ledger and its row, in one transaction. Returns the version.

        Raises Conflict when the head is not the expected one (look at the edit again at the new head and come back),
        Cancelled when a cancel came first, LeaseLost when the job was taken over. Nothing is written then.
        """
        try:
            with self.database.write_session() as session:
                head = ledger.lock_ledger(session, self.model)
                row = self._row_under_fence(session, job, allow_finished=True)
                if row.status == "running":
                    _check_can_commit(row, head, expected_head)
                    self._insert_edit(session, row, factors, body, result)
                version, finished = row.version, serialize_job(session, row)
                crash_points.crash_point("apply.before_commit")
        except IntegrityError as error:  # the lock makes this impossible; the schema makes it certain
            raise Conflict(f"head moved from {expected_head}.") from error
        crash_points.crash_point("apply.after_commit")
        self._publish_end(finished)
        if version is None:
            raise LeaseLost(f"{job.id} has ended without landing.")
        return version

    def _insert_edit(
        self, session: Session, row: Job, factors: bytes, body: dict[str, Any], result: dict[str, Any]
    ) -> None:
        sha256 = hashlib.sha256(factors).hexdigest()
        fact = {name: row.request.get(name) for name in ("subject", "prompt", "target_new", "target_true")}
        session.add(StoredFactors(edit_id=row.id, data=factors, sha256=sha256))
        body = {**body, **fact, "factors_sha256": sha256, "model": self.model}
        ledger.append_entry(session, self.model, ledger.APPLY, row, row.actor, body)
        _finish_row(session, row, "applied", result)

    def finish(self, job: ClaimedJob, status: str, result: dict[str, Any] | None = None) -> None:
        """End a job that leaves the ledger as it is."""
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
            running = row.status == "running"
            finished = _finish_row(session, row, status, **values) if running else serialize_job(session, row)
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
        """The row, held for this transaction, if this attempt still owns it.

        `or_ended`: also if this very attempt has ended it before, and was left in doubt whether that was committed.
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
        raise LeaseLost(f"attempt {job.attempt} at {job.id} is no longer the running one.")


def _check_can_commit(row: Job, head: int, expected_head: int) -> None:
    if row.cancel_requested:
        raise Cancelled("the edit was cancelled before it landed.")
    if head != expected_head:
        raise Conflict(f"head moved from {expected_head} to {head}.", head=head)


def _mark_exhausted(session: Session, job: Job) -> ResourceDict:
    """The job has killed too many workers, or met too many that died: a person may look, and retry it."""
    detail = f"its worker died {job.attempts} times while it ran; it is not tried again."
    job.worker, job.exhausted = None, True  # nobody's: a worker that was only frozen has not ended it
    return _finish_row(session, job, "failed", error=error_document(AttemptsExhausted(detail)))


def _finish_row(
    session: Session,
    job: Job,
    status: str,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> ResourceDict:
    """Write a job's end; returns the resource to announce after the commit."""
    if job.kind == "trace" and result is not None:
        job.version = result.get("version")
    job.status, job.result, job.error = status, to_json_value(result), error
    job.progress = None
    job.ended = job.updated = now()
    session.flush()
    artifacts.delete_artifacts(session, job)
    return serialize_job(session, job)
