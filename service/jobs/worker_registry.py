"""The rows of workers: liveness, quarantine and roles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, or_, select
from sqlalchemy.orm import Session

from service.db.models import Model, Worker, now
from service.jobs.views import ResourceDict
from service.ledger.ledger import iso_utc

WORKER_RETENTION = timedelta(days=1)  #: time after which the row of a dead or quarantined worker is deleted


def alive(lease: timedelta) -> ColumnElement[bool]:
    """Return the SQL condition for workers with a heartbeat within the lease that are not quarantined."""
    return and_(Worker.heartbeat >= now() - lease, Worker.reason.is_(None))


def list_workers(session: Session, model: str, lease: timedelta) -> list[Worker]:
    """Return the live workers of a model and the quarantined ones whose rows are kept."""
    withdrawn = and_(Worker.reason.is_not(None), Worker.heartbeat >= now() - WORKER_RETENTION)
    query = select(Worker).where(Worker.model == model, or_(alive(lease), withdrawn))
    return list(session.scalars(query.order_by(Worker.id)))


def find_foreign_workers(session: Session, model: str, lease: timedelta) -> list[str]:
    """Return a short description of every live worker that serves another model."""
    others = select(Worker, Model.name).join(Model, Model.fingerprint == Worker.model)
    rows = session.execute(others.where(Worker.model != model, alive(lease)).order_by(Worker.id))
    return [f"{worker.id} on {worker.host} serves {name}" for worker, name in rows]


def prune_workers(session: Session) -> None:
    """Delete the rows of workers without a heartbeat within WORKER_RETENTION."""
    session.execute(delete(Worker).where(Worker.heartbeat < now() - WORKER_RETENTION))


def serving_workers(workers: Sequence[Worker], role: str | None = None) -> list[Worker]:
    """Return the workers that are not quarantined and have the role, if one is given. A worker without roles has
    all."""
    return [w for w in workers if w.reason is None and (role is None or not w.roles or role in w.roles)]


def serialize_worker(worker: Worker, head: int) -> ResourceDict:
    """Return the resource of a worker; `lag` is the number of versions between its version and the head."""
    return {
        "id": worker.id,
        "state": "serving" if worker.reason is None else "withdrawn",
        "reason": worker.reason,
        "roles": worker.roles,
        "version": worker.version,
        "lag": head - worker.version,
        "digest": worker.digest,
        "heartbeat": iso_utc(worker.heartbeat),
        "age": round((now() - worker.heartbeat).total_seconds(), 3),
        "started": iso_utc(worker.started),
        "host": worker.host,
        "pid": worker.pid,
        "preparing": worker.preparing,
    }
