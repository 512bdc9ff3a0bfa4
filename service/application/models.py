"""The resident model: its head, workers, editable layers and readiness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from service.application.served_model import CHAT_INFO, get_served_model
from service.db.database import Database
from service.db.models import Job, LedgerEntry, Model, Worker, now
from service.errors import Unavailable
from service.evaluation.suites.registry import SUITES
from service.jobs import worker_registry
from service.jobs.broker import Broker
from service.jobs.job_kinds import CALL_KINDS, JOB_KINDS, ROLES
from service.jobs.views import OPEN_STATUSES, ResourceDict
from service.ledger import ledger
from service.methods.registry import METHODS

T = TypeVar("T")


class ModelService:
    """The served model, its workers and the readiness of the service."""

    def __init__(self, database: Database, broker: Broker, lease: timedelta) -> None:
        self.database, self.broker, self.lease = database, broker, lease

    def describe(self) -> ResourceDict:
        """Return the served model: its info, newest version, workers, active edits and job counts."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            head = ledger.head(session, model.fingerprint)
            worker_rows = worker_registry.list_workers(session, model.fingerprint, self.lease)
            return {
                **model.info,
                CHAT_INFO: model.info.get(CHAT_INFO) is not None,
                "fingerprint": model.fingerprint,
                "name": model.name,
                "head": head,
                "active_edits": session.scalar(select(func.count()).where(*_active_edits_filter(model))),
                "methods": [method.describe() for method in METHODS.values()],
                "suites": [suite.describe() for suite in SUITES.values()],
                "jobs": _job_counts(session, model),
                "workers": [worker_registry.serialize_worker(worker, head) for worker in worker_rows],
                "created": ledger.iso_utc(model.created),
            }

    def check_ready(self) -> ResourceDict:
        """Return the state of a ready service. Raises Unavailable, whose `extra["reasons"]` lists what is missing."""
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
        live = [w for w in worker_rows if w.reason is None]  # no names: probes need no key
        return {"ready": True, "head": head, "workers": len(live), "waiting": waiting}

    def _readiness_state(self) -> tuple[int, int, list[Worker], dict[str, int]]:
        """Return the newest version, the version that workers must have reached, the workers and the queued jobs by
        kind."""
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
        """Raise Unavailable if no live worker has the role of this kind of work."""
        role = next(role for role, kinds in ROLES.items() if kind in kinds)
        with self.database.read_session() as session:
            worker_rows = worker_registry.list_workers(
                session, get_served_model(session).fingerprint, self.lease
            )
        if not worker_registry.serving_workers(worker_rows, role):
            raise Unavailable(f"no worker with the role {role} is alive: start one and try again.")


def _try_collecting_reasons(query: Callable[[], T], reasons: list[str]) -> T | None:
    """Return the result of a query, or None and add the reason if a dependency is unavailable."""
    try:
        return query()
    except Unavailable as error:
        reasons += error.extra.get("reasons", [error.detail.rstrip(".")])
        return None


def _unready_reasons(
    worker_rows: Sequence[Worker], required_version: int, waiting: dict[str, int]
) -> list[str]:
    """Return why the service is not ready: no live worker, none at the newest version, or queued work without a
    worker."""
    if not worker_registry.serving_workers(worker_rows):
        return ["no worker is alive"]
    reasons = []
    generating = worker_registry.serving_workers(worker_rows, "generate")
    if not generating:
        reasons.append("no live worker has the role generate")
    elif all(worker.version < required_version for worker in generating):
        reasons.append(f"no worker has reached version {required_version} yet")
    for role, kinds in ROLES.items():
        count = sum(waiting.get(kind, 0) for kind in kinds)
        if count and role != "generate" and not worker_registry.serving_workers(worker_rows, role):
            reasons.append(f"{count} jobs are queued and no live worker has the role {role}")
    return reasons


def _active_edits_filter(model: Model) -> tuple[ColumnElement[bool], ...]:
    applied = (Job.kind == "edit", Job.status == "applied", Job.version.is_not(None))
    return Job.model == model.fingerprint, *applied


def _queued_by_kind(session: Session, model: Model) -> dict[str, int]:
    """Queued jobs by kind."""
    queued = and_(Job.model == model.fingerprint, Job.status == "queued")
    return dict.fromkeys(JOB_KINDS, 0) | _count_by(session, Job.kind, queued)


def _job_counts(session: Session, model: Model) -> dict[str, int]:
    """Return the numbers of queued, running and exhausted jobs."""
    counted_statuses = or_(Job.status.in_(OPEN_STATUSES), and_(Job.status == "failed", Job.exhausted))
    count_by_status = _count_by(session, Job.status, and_(Job.model == model.fingerprint, counted_statuses))
    names = {"queued": "queued", "running": "running", "exhausted": "failed"}
    return {name: count_by_status.get(status, 0) for name, status in names.items()}


def _count_by(session: Session, column: Any, condition: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(column, func.count()).where(condition).group_by(column))
    return {str(value): count for value, count in rows}
