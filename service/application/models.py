"""The resident model as it stands: its head, its workers, its edits, and whether all of it is up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from service.application.served_model import get_served_model
from service.db.database import Database
from service.db.models import Job, LedgerEntry, Model, Worker, now
from service.errors import Unavailable
from service.jobs import worker_registry
from service.jobs.broker import Broker
from service.jobs.job_kinds import CALL_KINDS, JOB_KINDS, ROLES
from service.jobs.views import OPEN_STATUSES, ResourceDict
from service.ledger import ledger
from service.methods.registry import METHODS

T = TypeVar("T")


class ModelService:
    """What is loaded, and who serves it."""

    def __init__(self, database: Database, broker: Broker, lease: timedelta) -> None:
        self.database, self.broker, self.lease = database, broker, lease

    def describe(self) -> ResourceDict:
        """The resident model: all of its info, its head, workers and active edits, and how many jobs wait and run."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            head = ledger.head(session, model.fingerprint)
            worker_rows = worker_registry.list_workers(session, model.fingerprint, self.lease)
            return {
                **model.info,
                "fingerprint": model.fingerprint,
                "name": model.name,
                "head": head,
                "active_edits": session.scalar(select(func.count()).where(*_active_edits_filter(model))),
                "methods": [method.describe() for method in METHODS.values()],
                "jobs": _job_counts(session, model),
                "workers": [worker_registry.serialize_worker(worker, head) for worker in worker_rows],
                "created": ledger.iso_utc(model.created),
            }

    def check_ready(self) -> ResourceDict:
        """What is up; raises Unavailable, whose `extra["reasons"]` lists all that is not."""
        reasons: list[str] = []
        queued_calls = _try_collecting_reasons(
            lambda: {kind: self.broker.queue_depth(kind) for kind in CALL_KINDS}, reasons
        )
        state = _try_collecting_reasons(self._readiness_state, reasons)
        if state is not None:
            head, required_version, worker_rows, queued_jobs = state
            waiting = (queued_calls or {}) | queued_jobs
            reasons += _unready_reasons(worker_rows, required_version, waiting)
        if state is None or reasons:
            raise Unavailable("; ".join(reasons) + ".", reasons=reasons)
        worker_views = [worker_registry.serialize_worker(worker, head) for worker in worker_rows]
        return {"ready": True, "head": head, "workers": worker_views, "waiting": waiting}

    def _readiness_state(self) -> tuple[int, int, list[Worker], dict[str, int]]:
        """The head, the newest version that a worker has had time to reach, the workers, and how many jobs wait."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            worker_rows = worker_registry.list_workers(session, model.fingerprint, self.lease)
            head = ledger.head(session, model.fingerprint)
            return head, self._required_version(session, model), worker_rows, _queued_by_kind(session, model)

    def _required_version(self, session: Session, model: Model) -> int:
        newest_due = select(func.max(LedgerEntry.version)).where(
            LedgerEntry.model == model.fingerprint, LedgerEntry.at < now() - self.lease
        )
        return session.scalar(newest_due) or 0

    def require_worker_for(self, kind: str) -> None:
        """Raise Unavailable when no living worker does this kind of work: whoever waits for it waits in vain."""
        role = next(role for role, kinds in ROLES.items() if kind in kinds)
        with self.database.read_session() as session:
            worker_rows = worker_registry.list_workers(
                session, get_served_model(session).fingerprint, self.lease
            )
        if not worker_registry.serving_workers(worker_rows, role):
            raise Unavailable(f"no worker is alive that does {role}: start one, and ask again.")


def _try_collecting_reasons(query: Callable[[], T], reasons: list[str]) -> T | None:
    """What a dependency says, or the reason why it says nothing."""
    try:
        return query()
    except Unavailable as error:
        reasons += error.extra.get("reasons", [error.detail.rstrip(".")])
        return None


def _unready_reasons(
    worker_rows: Sequence[Worker], required_version: int, waiting: dict[str, int]
) -> list[str]:
    """Why the service is not ready: nobody lives, nobody speaks at head, or work waits that nobody does."""
    if not worker_registry.serving_workers(worker_rows):
        return ["no worker is alive"]
    reasons = []
    generating = worker_registry.serving_workers(worker_rows, "generate")
    if not generating:
        reasons.append("no living worker does generate")
    elif all(worker.version < required_version for worker in generating):
        reasons.append(f"no worker has reached version {required_version} yet")
    for role, kinds in ROLES.items():
        count = sum(waiting.get(kind, 0) for kind in kinds)
        if count and role != "generate" and not worker_registry.serving_workers(worker_rows, role):
            reasons.append(f"{count} jobs wait and no living worker does {role}")
    return reasons


def _active_edits_filter(model: Model) -> tuple[ColumnElement[bool], ...]:
    applied = (Job.kind == "edit", Job.status == "applied", Job.version.is_not(None))
    return Job.model == model.fingerprint, *applied


def _queued_by_kind(session: Session, model: Model) -> dict[str, int]:
    """Queued jobs by kind."""
    queued = and_(Job.model == model.fingerprint, Job.status == "queued")
    return dict.fromkeys(JOB_KINDS, 0) | _count_by(session, Job.kind, queued)


def _job_counts(session: Session, model: Model) -> dict[str, int]:
    """How many jobs wait, run, and were given up."""
    counted_statuses = or_(Job.status.in_(OPEN_STATUSES), and_(Job.status == "failed", Job.exhausted))
    count_by_status = _count_by(session, Job.status, and_(Job.model == model.fingerprint, counted_statuses))
    names = {"queued": "queued", "running": "running", "exhausted": "failed"}
    return {name: count_by_status.get(status, 0) for name, status in names.items()}


def _count_by(session: Session, column: Any, condition: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(column, func.count()).where(condition).group_by(column))
    return {str(value): count for value, count in rows}
