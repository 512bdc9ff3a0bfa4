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
from service.db.models import Factors, Job, Model, Worker, now, plain
from service.errors import Cancelled, Conflict, Disagrees, LeaseLost, NotFound, PalimpsestError
from service.jobs import artifacts, attestations, worker_registry
from service.jobs.broker import Broker, told
from service.jobs.views import OPEN, Resource, resource
from service.kit import crash_points, metrics
from service.kit.ids import kind_of
from service.kit.steps import Progress
from service.ledger import ledger

log = logging.getLogger(__name__)

LEASE = 30.0  #: seconds without a heartbeat after which a worker counts as dead
ROW_SECONDS = 0.5  #: progress is written to the row at most this often
SWEEP_LIMIT = 1000  #: bells rung at once
PRUNE_SECONDS = 3600.0  #: between two looks for workers long gone


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
    request_id: str = ""  #: of the HTTP request that asked for it


class Desk:
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
        self._row: dict[str, Any] = {}  # this worker's own, while it is registered
        self._pruned = float("-inf")
        self._past: list[ledger.Entry] = []  # of the ledger, as far as it was read

    # the worker itself

    def register(self, info: dict[str, Any], tokenizer_json: str, roles: Sequence[str] = ()) -> None:
        """Say which model is resident here. `info["name"]` names it, `info["device"]` says where it stands."""
        self.device = str(info.get("device", ""))
        name, at = str(info.get("name", self.model)), now()
        model = {"name": name, "info": plain(info), "tokenizer": tokenizer_json, "registered": at}
        worker = {"id": self.worker, "model": self.model, "roles": list(roles), "version": 0, "digest": None}
        process = {"started": at, "host": socket.gethostname(), "pid": os.getpid(), "reason": None}
        with (
            suppress(IntegrityError),
            self.database.session() as session,
        ):  # another worker may have been first
            if session.get(Model, self.model) is None:
                session.add(Model(fingerprint=self.model, created=at, **model))
        with self.database.session() as session:
            session.execute(update(Model).where(Model.fingerprint == self.model).values(model))
            session.merge(Worker(**worker, **process, heartbeat=at))
        self._row = worker | process

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        """This worker lives, and stands at a version. Its row is made again when it was struck out meanwhile."""
        standing: dict[str, Any] = {"heartbeat": now(), "version": version, "digest": digest}
        with self.database.session() as session:
            if worker := session.get(Worker, self.worker):
                worker.heartbeat, worker.version, worker.digest = standing.values()
            elif self._row:
                session.add(Worker(**self._row | standing))

    def tell_room(self, version: int, room: dict[int, float]) -> None:
        """What is left of an average key at a version, by edited layer: `GET /models` shows it."""
        said = {"version": version, "layers": {str(x): left for x, left in sorted(room.items())}}
        with self.database.session() as session:
            model = session.get(Model, self.model)
            if model is not None and model.info.get("room", {}).get("version", -1) < version:
                model.info = {**model.info, "room": said}

    def leave(self) -> None:
        """This worker stops: what it still has running may be taken over at once. One that withdrew stays listed."""
        self._row = {}
        with self.database.session() as session:
            session.execute(delete(Worker).where(Worker.id == self.worker, Worker.reason.is_(None)))

    def strangers(self) -> list[str]:
        """The living workers that have another model resident, in words: two models are not served side by side."""
        with self.database.read() as session:
            return worker_registry.strangers(session, self.model, self.lease)

    def editors(self) -> int:
        """How many living workers edit this model; at least this one."""
        if self.sole:
            return 1
        with self.database.read() as session:
            listed = worker_registry.listed(session, self.model, self.lease)
            return max(1, len(worker_registry.serving(listed, "edit")))

    def attest(self, version: int, digest: str) -> None:
        """The weights at this version have this digest here.

        Raises Disagrees when more workers say otherwise: this one is withdrawn then, and must serve nothing any more.
        """
        with self.database.session() as session:
            ledger.lock(session, self.model)
            attestations.attest(session, self.model, version, self.worker, digest, self.device)
            reference = attestations.reference(session, self.model, version, self.device, self.lease)
            if reference == digest:
                return
            reason = (
                f"its weights at version {version} have the digest {digest[:12]} and those of the others "
                f"{str(reference)[:12]}: see that the model's files, the libraries and the memory are sound and like theirs."
            )
            self._withdraw(session, reason)
        raise Disagrees(f"this worker takes itself out: {reason}")

    def withdraw(self, reason: str) -> None:
        """This worker takes itself out: its word counts no longer, and what it has running may be taken over."""
        with self.database.session() as session:
            ledger.lock(session, self.model)
            self._withdraw(session, reason)

    def _withdraw(self, session: Session, reason: str) -> None:
        attestations.withdraw(session, self.model, self.worker)
        session.execute(update(Worker).where(Worker.id == self.worker).values(reason=reason, heartbeat=now()))

    def sweep(self) -> int:
        """Ring the bell for every job whose bell was lost or whose worker died; returns how many it rang for.

        Every worker sweeps: ringing twice is harmless. Where as many deliveries wait as rows, none was lost.
        """
        with self.database.read() as session:
            open_jobs = (
                select(Job.id, Job.kind, Job.status)
                .outerjoin(Worker, Worker.id == Job.worker)
                .where(Job.model == self.model, or_(Job.status == "queued", self._orphaned()))
                .order_by(Job.id)
            )
            found = session.execute(open_jobs).all()
        queued = Counter(row.kind for row in found if row.status == "queued")
        lost = {kind for kind, rows in queued.items() if self.broker.waiting(kind) < rows}
        silent = [row for row in found if row.status != "queued" or row.kind in lost][:SWEEP_LIMIT]
        for row in silent:
            self.broker.announce(row.id, row.kind)
        self._prune()
        return len(silent)

    def _orphaned(self) -> ColumnElement[bool]:
        """A job that runs and has no worker: it left, died or took itself out, or knows nothing of it any more."""
        mine = and_(Job.worker == self.worker, Job.id.not_in(self._running.copy()))
        gone = true() if self.sole else or_(Worker.id.is_(None), ~worker_registry.living(self.lease))
        return and_(Job.status == "running", or_(mine, and_(Job.worker != self.worker, gone)))

    def _prune(self) -> None:
        if time.monotonic() - self._pruned < PRUNE_SECONDS:
            return
        with self.database.session() as session:
            worker_registry.prune(session)
        self._pruned = time.monotonic()

    # one job

    def start(self, job_id: str) -> RunningJob | None:
        """Begin a job that waits, or whose worker died. None when there is nothing to do for this worker."""
        ended = begun = None
        with self.database.session() as session:
            job = self._locked(session, job_id)
            if job is None or job.model != self.model or job.status not in OPEN:
                return None
            if job.status == "running" and not self._is_orphan(session, job):
                return None
            if job.cancel_requested:
                job.worker = None
                ended = _end(session, job, "cancelled")
            elif job.attempts >= self.max_attempts:
                ended = _give_up(session, job)
            else:
                begun = self._begin(job)
                # who begins a job lives, also when it slept so long that its heartbeat says otherwise
                session.execute(update(Worker).where(Worker.id == self.worker).values(heartbeat=now()))
            session.flush()
            crash_points.reach("start.before_commit")
        crash_points.reach("start.after_commit")
        if ended:
            self._announce_end(ended)
        if begun:
            self._running.add(begun.id)
        return begun

    def _is_orphan(self, session: Session, job: Job) -> bool:
        orphan = select(Job.id).outerjoin(Worker, Worker.id == Job.worker)
        return session.scalar(orphan.where(Job.id == job.id, self._orphaned())) is not None

    def _begin(self, job: Job) -> RunningJob:
        job.status, job.worker, job.attempts = "running", self.worker, job.attempts + 1
        job.started = job.updated = now()
        job.progress = None
        self._cancelled.discard(job.id)
        return RunningJob(
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

    def release(self, job: RunningJob) -> None:
        """Put a job back that this worker cannot finish because it stops; the attempt does not count."""
        ended = None
        with self.database.session() as session:
            row = self._mine(session, job, or_ended=True)
            if row.status == "running":
                row.status, row.worker, row.attempts, row.updated = "queued", None, job.attempt - 1, now()
            else:
                ended = resource(session, row)
        if ended:
            self._announce_end(ended)
            return
        self._forget(job.id)
        with told(job.id):
            self.broker.announce(job.id, job.kind)

    def abandon(self, job: RunningJob) -> None:
        """This worker does a job no longer and cannot write so: the sweep finds it, and it is tried again."""
        self._forget(job.id)

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

    def keep(self, job: RunningJob, name: str, data: bytes) -> None:
        """Keep a part of a job for whoever goes on with it. Raises LeaseLost when the job was taken over."""
        with self.database.session() as session:
            self._mine(session, job)
            artifacts.put(session, job.id, name, data)

    def kept(self, job: RunningJob, name: str) -> bytes | None:
        """A part of a job, kept by this attempt or by one before it. What reads needs no fence."""
        with self.database.read() as session:
            return artifacts.get(session, job.id, name)

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
        try:
            with self.database.session() as session:
                head = ledger.lock(session, self.model)
                row = self._mine(session, job, or_ended=True)
                if row.status == "running":
                    _check_landing(row, head, expected_head)
                    self._land(session, row, factors, body, result)
                version, ended = row.version, resource(session, row)
                crash_points.reach("apply.before_commit")
        except IntegrityError as error:  # the lock makes this impossible; the schema makes it certain
            raise Conflict(f"head moved from {expected_head}.") from error
        crash_points.reach("apply.after_commit")
        self._announce_end(ended)
        if version is None:
            raise LeaseLost(f"{job.id} has ended without landing.")
        return version

    def _land(
        self, session: Session, row: Job, factors: bytes, body: dict[str, Any], result: dict[str, Any]
    ) -> None:
        sha256 = hashlib.sha256(factors).hexdigest()
        what = {name: row.request.get(name) for name in ("subject", "prompt", "target_new", "target_true")}
        session.add(Factors(edit_id=row.id, data=factors, sha256=sha256))
        body = {**body, **what, "factors_sha256": sha256, "model": self.model}
        ledger.append(session, self.model, ledger.APPLY, row, row.actor, body)
        _end(session, row, "applied", result)

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
            row = self._mine(session, job, or_ended=True)
            running = row.status == "running"
            ended = _end(session, row, status, **values) if running else resource(session, row)
        self._announce_end(ended)

    def _announce_end(self, ended: Resource) -> None:
        self._forget(ended["id"])
        metrics.JOBS_ENDED.labels(kind_of(ended["id"]), ended["status"]).inc()
        with told(ended["id"]):
            self.broker.publish(ended["id"], "end", ended, last=True)
        crash_points.reach("end.after_publish")

    def _forget(self, job_id: str) -> None:
        self._written.pop(job_id, None)
        self._cancelled.discard(job_id)
        self._running.discard(job_id)

    def _locked(self, session: Session, job_id: str) -> Job | None:
        return session.scalar(select(Job).where(Job.id == job_id).with_for_update())

    def _mine(self, session: Session, job: RunningJob, or_ended: bool = False) -> Job:
        """The row, held for this transaction, if this attempt still owns it.

        `or_ended`: also if this very attempt has ended it before, and was left in doubt whether that was committed.
        """
        row = self._locked(session, job.id)
        mine = row is not None and (row.worker, row.attempts) == (self.worker, job.attempt)
        if row is not None and mine and (row.status == "running" or (or_ended and row.status not in OPEN)):
            return row
        self._forget(job.id)
        raise LeaseLost(f"attempt {job.attempt} at {job.id} is no longer the running one.")

    # the ledger

    def head(self) -> int:
        with self.database.glance() as connection:
            return ledger.head(connection, self.model)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        """(edit id, the body of its entry) of the edits active at a version, in canonical order."""
        with self.database.read() as session:
            past = self._entries(session)
        if not 0 <= version <= len(past):
            raise NotFound(f"there is no version {version}.")
        return [(e.edit_id, e.body) for e in ledger.active_entries(past, version)]

    def _entries(self, session: Session) -> list[ledger.Entry]:
        """The whole ledger. Entries never change, so only what is new is read; unless the last known one is another now,
        because a back-up was put in place."""
        past = self._past
        new = ledger.entries(session, self.model, after=max(0, len(past) - 1))
        if past and (not new or new[0].hash != past[-1].hash):
            past, new = [], ledger.entries(session, self.model)
        self._past = [*past[:-1], *new]
        return self._past

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        """The factors of these edits, by id: they never change."""
        with self.database.read() as session:
            return ledger.factors_of(session, edits)


def forget_workers(database: Database) -> None:
    """Strike out all workers: for the embedded wiring as it starts, where whoever is still listed was killed."""
    with database.session() as session:
        session.execute(delete(Worker))


def _check_landing(row: Job, head: int, expected_head: int) -> None:
    if row.cancel_requested:
        raise Cancelled("the edit was cancelled before it landed.")
    if head != expected_head:
        raise Conflict(f"head moved from {expected_head} to {head}.", head=head)


def _give_up(session: Session, job: Job) -> Resource:
    """The job has killed too many workers, or met too many that died: a person may look, and retry it."""
    detail = f"its worker died {job.attempts} times while it ran; it is not tried again."
    job.worker, job.dead = None, True  # nobody's: a worker that was only frozen has not ended it
    return _end(session, job, "failed", error={"title": "The job was given up", "detail": detail})


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
    artifacts.drop(session, job)
    return resource(session, job)
