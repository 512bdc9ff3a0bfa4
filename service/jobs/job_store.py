"""What a worker may do with the rows of jobs.

A job may be delivered twice and to two workers. Each start counts an attempt, and every later write is fenced by it:
a worker whose job was taken over can no longer write anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import Job, Model, StoredFactors, Worker, now, to_json_value
from service.errors import Cancelled, Conflict, DigestMismatch, LeaseLost, NotFound, PalimpsestError
from service.jobs import artifacts, attestations, worker_registry
from service.jobs.broker import Broker, ignoring_broker_outage
from service.jobs.views import OPEN_STATUSES, ResourceDict, serialize_job
from service.kit import crash_points, metrics
from service.kit.ids import prefix_of
from service.kit.steps import Progress
from service.ledger import ledger

log = logging.getLogger(__name__)

DEFAULT_LEASE_SECONDS = 30.0  #: seconds without a heartbeat after which a worker counts as dead
PROGRESS_WRITE_INTERVAL = 0.5  #: progress is written to the row at most this often
MAX_LOST_JOBS_NOTIFIED = 1000  #: bells rung at once
WORKER_PRUNE_INTERVAL = 3600.0  #: between two looks for workers long gone


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


class WorkerJobs:
    """One worker's view of the jobs of its model. Safe to share between threads.

    A commit whose answer is lost leaves the caller in doubt (Unavailable): every method can then be called again with
    the same arguments, and finds out by itself whether it was carried out.

    `sole` says that no other worker exists (the embedded wiring): whatever another one left running is an orphan at
    once, not only when its lease is over.
    """

    def __init__(
        self,
        database: Database,
        broker: Broker,
        model_fingerprint: str,
        worker_id: str,
        max_attempts: int = 3,
        *,
        lease: float = DEFAULT_LEASE_SECONDS,
        single_process: bool = False,
    ) -> None:
        self.database = database
        self.broker = broker
        self.model = model_fingerprint
        self.worker = worker_id
        self.max_attempts = max_attempts
        self.lease = timedelta(seconds=lease)
        self.single_process = single_process
        self.device = ""
        self._progress_written_at: dict[
            str, float
        ] = {}  # job id -> when its progress was last written to the row
        self._cancelled_jobs: set[str] = set()
        self._running_jobs: set[str] = set()  # begun and not ended by this very object
        self._worker_row: dict[str, Any] = {}  # this worker's own, while it is registered
        self._pruned_at = float("-inf")
        self._cached_entries: list[ledger.Entry] = []  # of the ledger, as far as it was read

    # the worker itself

    def register(self, info: dict[str, Any], tokenizer_json: str, roles: Sequence[str] = ()) -> None:
        """Say which model is resident here. `info["name"]` names it, `info["device"]` says where it stands."""
        self.device = str(info.get("device", ""))
        name, registered_at = str(info.get("name", self.model)), now()
        model = {
            "name": name,
            "info": to_json_value(info),
            "tokenizer": tokenizer_json,
            "registered": registered_at,
        }
        worker = {"id": self.worker, "model": self.model, "roles": list(roles), "version": 0, "digest": None}
        process = {"started": registered_at, "host": socket.gethostname(), "pid": os.getpid(), "reason": None}
        with (
            suppress(IntegrityError),
            self.database.write_session() as session,
        ):  # another worker may have been first
            if session.get(Model, self.model) is None:
                session.add(Model(fingerprint=self.model, created=registered_at, **model))
        with self.database.write_session() as session:
            session.execute(update(Model).where(Model.fingerprint == self.model).values(model))
            session.merge(Worker(**worker, **process, heartbeat=registered_at))
        self._worker_row = worker | process

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        """This worker lives, and stands at a version. Its row is made again when it was struck out meanwhile."""
        values: dict[str, Any] = {"heartbeat": now(), "version": version, "digest": digest}
        with self.database.write_session() as session:
            if worker := session.get(Worker, self.worker):
                worker.heartbeat, worker.version, worker.digest = values.values()
            elif self._worker_row:
                session.add(Worker(**self._worker_row | values))

    def record_capacity(self, version: int, capacity: dict[int, float]) -> None:
        """What is left of an average key at a version, by edited layer: `GET /models` shows it."""
        recorded = {"version": version, "layers": {str(x): left for x, left in sorted(capacity.items())}}
        with self.database.write_session() as session:
            model = session.get(Model, self.model)
            if model is not None and model.info.get("room", {}).get("version", -1) < version:
                model.info = {**model.info, "room": recorded}

    def deregister(self) -> None:
        """This worker stops: what it still has running may be taken over at once. One that withdrew stays listed."""
        self._worker_row = {}
        with self.database.write_session() as session:
            session.execute(delete(Worker).where(Worker.id == self.worker, Worker.reason.is_(None)))

    def foreign_workers(self) -> list[str]:
        """The living workers that have another model resident, in words: two models are not served side by side."""
        with self.database.read_session() as session:
            return worker_registry.find_foreign_workers(session, self.model, self.lease)

    def count_edit_workers(self) -> int:
        """How many living workers edit this model; at least this one."""
        if self.single_process:
            return 1
        with self.database.read_session() as session:
            listed_workers = worker_registry.list_workers(session, self.model, self.lease)
            return max(1, len(worker_registry.serving_workers(listed_workers, "edit")))

    def attest(self, version: int, digest: str) -> None:
        """The weights at this version have this digest here.

        Raises Disagrees when more workers say otherwise: this one is withdrawn then, and must serve nothing any more.
        """
        with self.database.write_session() as session:
            ledger.lock_ledger(session, self.model)
            attestations.attest(session, self.model, version, self.worker, digest, self.device)
            expected = attestations.majority_digest(session, self.model, version, self.device, self.lease)
            if expected == digest:
                return
            reason = (
                f"its weights at version {version} have the digest {digest[:12]} and those of the others "
                f"{str(expected)[:12]}: see that the model's files, the libraries and the memory are sound and like theirs."
            )
            self._quarantine(session, reason)
        raise DigestMismatch(f"this worker takes itself out: {reason}")

    def quarantine(self, reason: str) -> None:
        """This worker takes itself out: its word counts no longer, and what it has running may be taken over."""
        with self.database.write_session() as session:
            ledger.lock_ledger(session, self.model)
            self._quarantine(session, reason)

    def _quarantine(self, session: Session, reason: str) -> None:
        attestations.withdraw_attestations(session, self.model, self.worker)
        session.execute(update(Worker).where(Worker.id == self.worker).values(reason=reason, heartbeat=now()))

    def notify_lost_jobs(self) -> int:
        """Ring the bell for every job whose bell was lost or whose worker died; returns how many it rang for.

        Every worker sweeps: ringing twice is harmless. Where as many deliveries wait as rows, none was lost.
        """
        with self.database.read_session() as session:
            open_jobs = (
                select(Job.id, Job.kind, Job.status)
                .outerjoin(Worker, Worker.id == Job.worker)
                .where(Job.model == self.model, or_(Job.status == "queued", self._orphaned()))
                .order_by(Job.id)
            )
            open_rows = session.execute(open_jobs).all()
        queued = Counter(row.kind for row in open_rows if row.status == "queued")
        kinds_with_lost_notifications = {
            kind for kind, rows in queued.items() if self.broker.queue_depth(kind) < rows
        }
        lost_rows = [
            row for row in open_rows if row.status != "queued" or row.kind in kinds_with_lost_notifications
        ][:MAX_LOST_JOBS_NOTIFIED]
        for row in lost_rows:
            self.broker.notify(row.id, row.kind)
        self._prune_workers()
        return len(lost_rows)

    def _orphaned(self) -> ColumnElement[bool]:
        """A job that runs and has no worker: it left, died or took itself out, or knows nothing of it any more."""
        own_orphan = and_(Job.worker == self.worker, Job.id.not_in(self._running_jobs.copy()))
        worker_gone = (
            true() if self.single_process else or_(Worker.id.is_(None), ~worker_registry.alive(self.lease))
        )
        return and_(Job.status == "running", or_(own_orphan, and_(Job.worker != self.worker, worker_gone)))

    def _prune_workers(self) -> None:
        if time.monotonic() - self._pruned_at < WORKER_PRUNE_INTERVAL:
            return
        with self.database.write_session() as session:
            worker_registry.prune_workers(session)
        self._pruned_at = time.monotonic()

    # one job

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
        return session.scalar(orphan.where(Job.id == job.id, self._orphaned())) is not None

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
                row.progress, row.updated = asdict(progress), now()
                if row.cancel_requested:
                    self._cancelled_jobs.add(job.id)
        self.broker.publish(job.id, "progress", asdict(progress))

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

    def fail(self, job: ClaimedJob, error: PalimpsestError | str) -> None:
        """End a job that cannot be done, and say why; Cancelled ends it as cancelled."""
        if isinstance(error, Cancelled):
            self._finish(job, "cancelled")
        elif isinstance(error, PalimpsestError):
            self._finish(job, "failed", error={"title": error.title, "detail": error.detail})
        else:
            self._finish(job, "failed", error={"title": "The job failed", "detail": error})

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

    # the ledger

    def head(self) -> int:
        with self.database.autocommit_read() as connection:
            return ledger.head(connection, self.model)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        """(edit id, the body of its entry) of the edits active at a version, in canonical order."""
        with self.database.read_session() as session:
            entries = self._load_entries(session)
        if not 0 <= version <= len(entries):
            raise NotFound(f"there is no version {version}.")
        return [(e.edit_id, e.body) for e in ledger.active_entries(entries, version)]

    def _load_entries(self, session: Session) -> list[ledger.Entry]:
        """The whole ledger. Entries never change, so only what is new is read; unless the last known one is another now,
        because a back-up was put in place."""
        cached = self._cached_entries
        new = ledger.entries(session, self.model, after=max(0, len(cached) - 1))
        if cached and (not new or new[0].hash != cached[-1].hash):
            cached, new = [], ledger.entries(session, self.model)
        self._cached_entries = [*cached[:-1], *new]
        return self._cached_entries

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        """The factors of these edits, by id: they never change."""
        with self.database.read_session() as session:
            return ledger.factors_of(session, edits)


def delete_all_workers(database: Database) -> None:
    """Strike out all workers: for the embedded wiring as it starts, where whoever is still listed was killed."""
    with database.write_session() as session:
        session.execute(delete(Worker))


def _check_can_commit(row: Job, head: int, expected_head: int) -> None:
    if row.cancel_requested:
        raise Cancelled("the edit was cancelled before it landed.")
    if head != expected_head:
        raise Conflict(f"head moved from {expected_head} to {head}.", head=head)


def _mark_exhausted(session: Session, job: Job) -> ResourceDict:
    """The job has killed too many workers, or met too many that died: a person may look, and retry it."""
    detail = f"its worker died {job.attempts} times while it ran; it is not tried again."
    job.worker, job.dead = None, True  # nobody's: a worker that was only frozen has not ended it
    return _finish_row(session, job, "failed", error={"title": "The job was given up", "detail": detail})


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
