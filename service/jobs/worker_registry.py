"""The rows of workers: who lives, who took itself out, and what each can do."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, or_, select
from sqlalchemy.orm import Session

from service.db.models import Model, Worker, now
from service.jobs.views import ResourceDict
from service.ledger.ledger import iso_utc

WORKER_RETENTION = timedelta(days=1)  #: how long a worker that is gone or took itself out is remembered


def alive(lease: timedelta) -> ColumnElement[bool]:
    """Workers that were heard of within the lease and serve."""
    return and_(Worker.heartbeat >= now() - lease, Worker.reason.is_(None))


def list_workers(session: Session, model: str, lease: timedelta) -> list[Worker]:
    """The living workers of a model, and those that took themselves out lately."""
    withdrawn = and_(Worker.reason.is_not(None), Worker.heartbeat >= now() - WORKER_RETENTION)
    query = select(Worker).where(Worker.model == model, or_(alive(lease), withdrawn))
    return list(session.scalars(query.order_by(Worker.id)))


def find_foreign_workers(session: Session, model: str, lease: timedelta) -> list[str]:
    """The living workers that have another model resident, each in a few words."""
    others = select(Worker, Model.name).join(Model, Model.fingerprint == Worker.model)
    rows = session.execute(others.where(Worker.model != model, alive(lease)).order_by(Worker.id))
    return [f"{worker.id} on {worker.host} serves {name}" for worker, name in rows]


def prune_workers(session: Session) -> None:
    """Strike out who has been silent for long."""
    session.execute(delete(Worker).where(Worker.heartbeat < now() - WORKER_RETENTION))


def serving_workers(workers: Sequence[Worker], role: str | None = None) -> list[Worker]:
    """Of these the ones that serve, in this role if one is named; a worker without roles does everything."""
    return [w for w in workers if w.reason is None and (role is None or not w.roles or role in w.roles)]


def serialize_worker(worker: Worker, head: int) -> ResourceDict:
    """A worker as the world sees it; `lag` is how many versions it stands behind the head."""
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
    }
