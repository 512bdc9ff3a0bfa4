"""One worker's registration: its row, its heartbeat, its attestations, the search for lost jobs, and pruning."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, or_, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import Job, Model, Worker, now, to_json_value
from service.errors import DigestMismatch
from service.jobs import attestations, worker_registry
from service.jobs.broker import Broker
from service.jobs.retention import Pruner, Retention
from service.ledger import ledger

DEFAULT_LEASE_SECONDS = 30.0  #: seconds without a heartbeat after which a worker counts as dead
MAX_LOST_JOBS_NOTIFIED = 1000  #: notifications that one sweep sends at most
COLLECTED = ("corpus", "statistics")  #: parts of a model's description that only workers that edit know
WORKER_PRUNE_INTERVAL = 3600.0  #: seconds between two deletions of old worker rows


class WorkerSession:
    """The identity of one worker: its id, its model's fingerprint, its device and its lease. Thread-safe.

    When the outcome of a commit is unknown, a method raises Unavailable and can be called again with the same
    arguments.

    `single_process` states that no other worker exists (the embedded wiring): a job that another worker id left
    running is an orphan at once, not only after its lease.
    """

    def __init__(
        self,
        database: Database,
        broker: Broker,
        model_fingerprint: str,
        worker_id: str,
        *,
        lease: float = DEFAULT_LEASE_SECONDS,
        single_process: bool = False,
        retention: Retention = Retention(),  # noqa: B008  # immutable
    ) -> None:
        self.database = database
        self.broker = broker
        self.model = model_fingerprint
        self.worker = worker_id
        self.lease = timedelta(seconds=lease)
        self.single_process = single_process
        self.device = ""
        self.running_jobs: set[str] = (
            set()
        )  #: ids of the jobs that this worker runs; the JobStore maintains it
        self.preparing: dict[str, Any] | None = None  #: what the next heartbeat says of the preparation
        self._worker_row: dict[str, Any] = {}  # the registered row; empty while the worker is not registered
        self._pruned_at = float("-inf")
        self._pruner = Pruner(database, retention)

    # registration

    def register(self, info: dict[str, Any], tokenizer_json: str, roles: Sequence[str] = ()) -> None:
        """Add or replace the rows of the model and of this worker.

        `info["name"]` is the model's name, `info["device"]` the device that holds it. What another worker knows of the
        corpus and the statistics stays.
        """
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
            suppress(IntegrityError),  # another worker inserted the model first
            self.database.write_session() as session,
        ):
            if session.get(Model, self.model) is None:
                session.add(Model(fingerprint=self.model, created=registered_at, **model))
        with self.database.write_session() as session:
            stored = session.get(Model, self.model)
            known = {key: stored.info[key] for key in COLLECTED if stored and key in stored.info}
            model["info"] = {**known, **to_json_value(info)}
            session.execute(update(Model).where(Model.fingerprint == self.model).values(model))
            session.merge(Worker(**worker, **process, heartbeat=registered_at))
        self._worker_row = worker | process

    def update_info(self, info: dict[str, Any]) -> None:
        """Replace parts of the description of the model in `GET /models`."""
        with self.database.write_session() as session:
            model = session.get(Model, self.model)
            if model is not None:
                model.info = {**model.info, **to_json_value(info)}

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        """Update the heartbeat, the served version and its digest. Insert the row again if it was deleted."""
        values: dict[str, Any] = {
            "heartbeat": now(),
            "version": version,
            "digest": digest,
            "preparing": self.preparing,
        }
        with self.database.write_session() as session:
            if worker := session.get(Worker, self.worker):
                worker.heartbeat, worker.version, worker.digest, worker.preparing = values.values()
            elif self._worker_row:
                session.add(Worker(**self._worker_row | values))

    def deregister(self) -> None:
        """Delete this worker's row, so that its running jobs can be taken over at once.

        The row of a quarantined worker stays.
        """
        self._worker_row = {}
        with self.database.write_session() as session:
            session.execute(delete(Worker).where(Worker.id == self.worker, Worker.reason.is_(None)))

    def record_capacity(self, version: int, capacity: dict[int, float]) -> None:
        """Store the remaining capacity of an average key at a version, by edited layer, for `GET /models`."""
        recorded = {"version": version, "layers": {str(x): left for x, left in sorted(capacity.items())}}
        with self.database.write_session() as session:
            model = session.get(Model, self.model)
            if model is not None and model.info.get("capacity", {}).get("version", -1) < version:
                model.info = {**model.info, "capacity": recorded}

    # other workers

    def foreign_workers(self) -> list[str]:
        """Return a short description of every live worker that serves another model."""
        with self.database.read_session() as session:
            return worker_registry.find_foreign_workers(session, self.model, self.lease)

    def count_edit_workers(self) -> int:
        """Return the number of live workers that edit this model, at least 1."""
        if self.single_process:
            return 1
        with self.database.read_session() as session:
            listed_workers = worker_registry.list_workers(session, self.model, self.lease)
            return max(1, len(worker_registry.serving_workers(listed_workers, "edit")))

    # attestations

    def attest(self, version: int, digest: str) -> None:
        """Record the digest of this worker's weights at a version.

        Raises DigestMismatch when the majority has another digest. The worker is quarantined then and must stop
        serving.
        """
        with self.database.write_session() as session:
            ledger.lock_ledger(session, self.model)
            attestations.attest(session, self.model, version, self.worker, digest, self.device)
            expected = attestations.majority_digest(session, self.model, version, self.device, self.lease)
            if expected == digest:
                return
            reason = (
                f"its weights at version {version} have the digest {digest[:12]} and those of the others "
                f"{str(expected)[:12]}: check the model files, the library versions and the memory of this worker."
            )
            self._quarantine(session, reason)
        raise DigestMismatch(f"this worker stops serving: {reason}")

    def quarantine(self, reason: str) -> None:
        """Withdraw this worker's attestations and mark it as not serving; its running jobs can be taken over."""
        with self.database.write_session() as session:
            ledger.lock_ledger(session, self.model)
            self._quarantine(session, reason)

    def _quarantine(self, session: Session, reason: str) -> None:
        attestations.withdraw_attestations(session, self.model, self.worker)
        session.execute(update(Worker).where(Worker.id == self.worker).values(reason=reason, heartbeat=now()))

    # lost jobs

    def notify_lost_jobs(self) -> int:
        """Notify for every job whose notification was lost or whose worker died; return the number of notifications.
        Then delete one batch of expired rows when that is due.

        Every worker sweeps, and a second notification of a job is harmless. A kind with as many pending deliveries
        as queued rows has lost none.
        """
        with self.database.read_session() as session:
            open_jobs = (
                select(Job.id, Job.kind, Job.status, Job.actor, Job.cost)
                .outerjoin(Worker, Worker.id == Job.worker)
                .where(Job.model == self.model, or_(Job.status == "queued", self.orphaned()))
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
            self.broker.notify(row.id, row.kind, row.actor, row.cost)
        self._prune_workers()
        self._pruner.step()
        return len(lost_rows)

    def orphaned(self) -> ColumnElement[bool]:
        """Return the SQL condition for a running job without a worker.

        The worker left, died or is quarantined, or it is this worker, which does not run the job. The condition needs
        an outer join of Job with Worker.
        """
        own_orphan = and_(Job.worker == self.worker, Job.id.not_in(self.running_jobs.copy()))
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


def delete_all_workers(database: Database) -> None:
    """Delete the rows of all workers: in the embedded wiring a row that exists at startup belongs to a killed
    process."""
    with database.write_session() as session:
        session.execute(delete(Worker))
