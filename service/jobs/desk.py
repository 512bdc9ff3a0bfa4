"""What a worker may do with the rows of jobs.

A job may be delivered twice and to two workers. Each start counts an attempt, and every later write is fenced by it:
a worker whose job was taken over can no longer write anything.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.errors import Cancelled, Conflict, LeaseLost, NotFound, PalimpsestError
from service.jobs.broker import Broker
from service.jobs.resources import OPEN, Resource, resource
from service.ledger import ledger
from service.progress import Progress
from service.store.database import Database
from service.store.tables import Attestation, Factors, Job, Model, Worker, now, plain

LEASE = 30.0  #: seconds without a heartbeat after which a worker counts as dead
ROW_SECONDS = 0.5  #: progress is written to the row at most this often
SWEEP_LIMIT = 1000


@dataclass(frozen=True)
class RunningJob:
    """A job that this worker has begun."""

    id: str
    kind: str
    attempt: int
    request: dict[str, Any]
    actor: str
    subject: str
    fact_key: str | None
    dry_run: bool


class Desk:
    """One worker's view of the jobs of its model. Safe to share between threads.

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
        lease: float = LEASE,
        sole: bool = False,
    ) -> None:
        self.database = database
        self.broker = broker
        self.model = model_fingerprint
        self.worker = worker_id
        self.max_attempts = max_attempts
        self.lease = timedelta(seconds=lease)
        self.sole = sole
        self.device = ""
        self._written: dict[str, float] = {}  # job id -> when its progress was last written to the row
        self._cancelled: set[str] = set()
        self._running: set[str] = set()  # begun and not ended by this very object

    # the worker itself

    def register(self, info: dict[str, Any], tokenizer_json: str, roles: Sequence[str] = ()) -> None:
        """Say which model is resident here. `info["name"]` names it, `info["device"]` says where it stands."""
        self.device = str(info.get("device", ""))
        name, at = str(info.get("name", self.model)), now()
        model = {"name": name, "info": plain(info), "tokenizer": tokenizer_json, "registered": at}
        worker = {"id": self.worker, "model": self.model, "roles": list(roles), "version": 0, "digest": None}
        process = {"heartbeat": at, "started": at, "host": socket.gethostname(), "pid": os.getpid()}
        with (
            suppress(IntegrityError),
            self.database.session() as session,
        ):  # another worker may have been first
            if session.get(Model, self.model) is None:
                session.add(Model(fingerprint=self.model, created=at, **model))
        with self.database.session() as session:
            session.execute(update(Model).where(Model.fingerprint == self.model).values(model))
            session.merge(Worker(**worker, **process))

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        """This worker lives, and stands at a version."""
        with self.database.session() as session:
            changes: dict[str, Any] = {"heartbeat": now(), "version": version, "digest": digest}
            session.execute(update(Worker).where(Worker.id == self.worker).values(changes))

    def leave(self) -> None:
        """This worker stops: what it still has running may be taken over at once."""
        with self.database.session() as session:
            if worker := session.get(Worker, self.worker):
                session.delete(worker)

    def attest(self, version: int, digest: str) -> None:
        """The weights at this version have this digest here."""
        with self.database.session() as session:
            session.merge(
                Attestation(
                    model=self.model,
                    version=version,
                    worker=self.worker,
                    digest=digest,
                    device=self.device,
                    at=now(),
                )
            )

    def sweep(self) -> int:
        """Ring the bell for every job that waits or whose worker died; returns how many. Ringing twice is harmless."""
        with self.database.read() as session:
            open_jobs = select(Job).where(Job.model == self.model, Job.status.in_(OPEN))
            found = [
                (job.id, job.kind)
                for job in session.scalars(open_jobs.order_by(Job.id).limit(SWEEP_LIMIT))
                if job.status == "queued" or self._orphaned(session, job)
            ]
        for job_id, kind in found:
            self.broker.announce(job_id, kind)
        return len(found)

    def _orphaned(self, session: Session, job: Job) -> bool:
        if job.worker == self.worker:  # of an earlier life under the same name, unless begun here
            return job.id not in self._running
        worker = session.get(Worker, job.worker)
        return self.sole or worker is None or worker.heartbeat < now() - self.lease

    # one job

    def start(self, job_id: str) -> RunningJob | None:
        """Begin a job that waits, or whose worker died. None when there is nothing to do for this worker."""
        ended = begun = None
        with self.database.session() as session:
            job = self._locked(session, job_id)
            if job is None or job.model != self.model or job.status not in OPEN:
                return None
            if job.status == "running" and not self._orphaned(session, job):
                return None
            if job.cancel_requested:
                ended = _end(session, job, "cancelled")
            elif job.attempts >= self.max_attempts:
                detail = f"its worker died {job.attempts} times while it ran; it is not tried again."
                error = {"title": "The job was given up", "detail": detail}
                ended = _end(session, job, "failed", error=error)
            else:
                begun = self._begin(job)
        if ended:
            self._announce_end(ended)
        if begun:
            self._running.add(begun.id)
        return begun

    def _begin(self, job: Job) -> RunningJob:
        job.status, job.worker, job.attempts = "running", self.worker, job.attempts + 1
        job.started = job.updated = now()
        job.progress = None
        self._cancelled.discard(job.id)
        return RunningJob(
            job.id, job.kind, job.attempts, job.request, job.actor, job.subject, job.fact_key, job.dry_run
        )

    def release(self, job: RunningJob) -> None:
        """Put a job back that this worker cannot finish because it stops; the attempt does not count."""
        with self.database.session() as session:
            row = self._mine(session, job)
            row.status, row.worker, row.attempts, row.updated = "queued", None, job.attempt - 1, now()
        self._forget(job.id)
        self.broker.announce(job.id, job.kind)

    def progress(self, job: RunningJob, progress: Progress) -> None:
        """Tell the listeners at once, and the row every now and then. Raises LeaseLost when the job was taken over."""
        at = time.monotonic()
        if at - self._written.get(job.id, -ROW_SECONDS) >= ROW_SECONDS:
            self._written[job.id] = at
            with self.database.session() as session:
                row = self._mine(session, job)
                row.progress, row.updated = asdict(progress), now()
                if row.cancel_requested:
                    self._cancelled.add(job.id)
        self.broker.publish(job.id, "progress", asdict(progress))

    def cancel_requested(self, job: RunningJob) -> bool:
        """Whether somebody wants this job to stop: known at once from the broker, in any case from the row."""
        return job.id in self._cancelled or self.broker.cancelled(job.id)

    def apply(
        self,
        job: RunningJob,
        expected_head: int,
        factors: bytes,
        body: dict[str, Any],
        result: dict[str, Any],
    ) -> int:
        """Land an edit: its factors, the next entry of the ledger and its row, in one transaction. Returns the version.

        Raises Conflict when the head is not the expected one (look at the edit again at the new head and come back),
        Cancelled when a cancel came first, LeaseLost when the job was taken over. Nothing is written then.
        """
        sha256 = hashlib.sha256(factors).hexdigest()
        what = {name: job.request.get(name) for name in ("subject", "prompt", "target_new", "target_true")}
        try:
            with self.database.session() as session:
                found = ledger.lock(session, self.model)
                row = self._mine(session, job)
                if row.cancel_requested:
                    raise Cancelled("the edit was cancelled before it landed.")
                if found != expected_head:
                    raise Conflict(f"head moved from {expected_head} to {found}.", head=found)
                session.add(Factors(edit_id=job.id, data=factors, sha256=sha256))
                body = {**body, **what, "factors_sha256": sha256, "model": self.model}
                entry = ledger.append(session, self.model, ledger.APPLY, row, row.actor, body)
                ended = _end(session, row, "applied", result)
        except IntegrityError as error:  # the lock makes this impossible; the schema makes it certain
            raise Conflict(f"head moved from {expected_head}.") from error
        self._announce_end(ended)
        return entry.version

    def finish(self, job: RunningJob, status: str, result: dict[str, Any] | None = None) -> None:
        """End a job that leaves the ledger as it is."""
        self._finish(job, status, result=result)

    def fail(self, job: RunningJob, error: PalimpsestError | str) -> None:
        """End a job that cannot be done, and say why; Cancelled ends it as cancelled."""
        if isinstance(error, Cancelled):
            self._finish(job, "cancelled")
        elif isinstance(error, PalimpsestError):
            self._finish(job, "failed", error={"title": error.title, "detail": error.detail})
        else:
            self._finish(job, "failed", error={"title": "The job failed", "detail": error})

    def _finish(self, job: RunningJob, status: str, **values: Any) -> None:
        with self.database.session() as session:
            ended = _end(session, self._mine(session, job), status, **values)
        self._announce_end(ended)

    def _announce_end(self, ended: Resource) -> None:
        """After the commit, and never a reason to fail: whoever missed the news reads the row."""
        self._forget(ended["id"])
        self.broker.publish(ended["id"], "end", ended, last=True)

    def _forget(self, job_id: str) -> None:
        self._written.pop(job_id, None)
        self._cancelled.discard(job_id)
        self._running.discard(job_id)

    def _locked(self, session: Session, job_id: str) -> Job | None:
        return session.scalar(select(Job).where(Job.id == job_id).with_for_update())

    def _mine(self, session: Session, job: RunningJob) -> Job:
        """The row, held for this transaction, if this attempt still owns it."""
        row = self._locked(session, job.id)
        owned = row is not None and row.status == "running" and row.worker == self.worker
        if row is None or not owned or row.attempts != job.attempt:
            self._forget(job.id)
            raise LeaseLost(f"attempt {job.attempt} at {job.id} is no longer the running one.")
        return row

    # the ledger

    def head(self) -> int:
        with self.database.read() as session:
            return ledger.head(session, self.model)

    def associations_at(self, version: int) -> list[tuple[str, bytes, dict[str, Any]]]:
        """(edit id, factors, the body of its entry) of the edits active at a version, in canonical order."""
        with self.database.read() as session:
            if not 0 <= version <= ledger.head(session, self.model):
                raise NotFound(f"there is no version {version}.")
            return [(e.edit_id, data, e.body) for e, data in ledger.factors_at(session, self.model, version)]


def forget_workers(database: Database) -> None:
    """Strike out all workers: for the embedded wiring as it starts, where whoever is still listed was killed."""
    with database.session() as session:
        session.execute(delete(Worker))


def _end(
    session: Session,
    job: Job,
    status: str,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> Resource:
    """Write a job's end; returns the resource to announce after the commit."""
    if job.kind == "trace" and result is not None:
        job.version = result.get("version")
    job.status, job.result, job.error = status, plain(result), error
    job.progress = None
    job.ended = job.updated = now()
    session.flush()
    return resource(session, job)
