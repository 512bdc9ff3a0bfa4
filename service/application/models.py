"""The resident model as it stands: its head, its workers, its edits, and whether all of it is up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from service.application.served_model import resident
from service.db.database import Database
from service.db.models import Job, LedgerEntry, Model, Worker, now
from service.errors import Unavailable
from service.jobs import worker_registry
from service.jobs.broker import CALLS, JOBS, Broker
from service.jobs.views import OPEN, Resource
from service.ledger import ledger

T = TypeVar("T")


class Models:
    """What is loaded, and who serves it."""

    def __init__(self, database: Database, broker: Broker, lease: timedelta) -> None:
        self.database, self.broker, self.lease = database, broker, lease

    def resident(self) -> Resource:
        """The resident model: all of its info, its head, workers and active edits, and how many jobs wait and run."""
        with self.database.read() as session:
            model = resident(session)
            head = ledger.head(session, model.fingerprint)
            listed = worker_registry.listed(session, model.fingerprint, self.lease)
            return {
                **model.info,
                "fingerprint": model.fingerprint,
                "name": model.name,
                "head": head,
                "active_edits": session.scalar(select(func.count()).where(*_active(model))),
                "jobs": _counts(session, model),
                "workers": [worker_registry.resource(worker, head) for worker in listed],
                "created": ledger.moment(model.created),
            }

    def ready(self) -> Resource:
        """What is up; raises Unavailable, whose `extra["reasons"]` lists all that is not."""
        reasons: list[str] = []
        calls = _tried(lambda: {kind: self.broker.waiting(kind) for kind in CALLS}, reasons)
        standing = _tried(self._standing, reasons)
        if standing is not None:
            head, due, listed, queued = standing
            waiting = (calls or {}) | queued
            reasons += _unready(listed, due, waiting)
        if standing is None or reasons:
            raise Unavailable("; ".join(reasons) + ".", reasons=reasons)
        shown = [worker_registry.resource(worker, head) for worker in listed]
        return {"ready": True, "head": head, "workers": shown, "waiting": waiting}

    def _standing(self) -> tuple[int, int, list[Worker], dict[str, int]]:
        """The head, the newest version that a worker has had time to reach, the workers, and how many jobs wait."""
        with self.database.read() as session:
            model = resident(session)
            listed = worker_registry.listed(session, model.fingerprint, self.lease)
            head = ledger.head(session, model.fingerprint)
            return head, self._due(session, model), listed, _waiting(session, model)

    def _due(self, session: Session, model: Model) -> int:
        settled = select(func.max(LedgerEntry.version)).where(
            LedgerEntry.model == model.fingerprint, LedgerEntry.at < now() - self.lease
        )
        return session.scalar(settled) or 0

    def check_attended(self, kind: str) -> None:
        """Raise Unavailable when no living worker does this kind of work: whoever waits for it waits in vain."""
        role = next(role for role, kinds in worker_registry.ROLES.items() if kind in kinds)
        with self.database.read() as session:
            listed = worker_registry.listed(session, resident(session).fingerprint, self.lease)
        if not worker_registry.serving(listed, role):
            raise Unavailable(f"no worker is alive that does {role}: start one, and ask again.")


def _tried(ask: Callable[[], T], reasons: list[str]) -> T | None:
    """What a dependency says, or the reason why it says nothing."""
    try:
        return ask()
    except Unavailable as error:
        reasons += error.extra.get("reasons", [error.detail.rstrip(".")])
        return None


def _unready(listed: Sequence[Worker], due: int, waiting: dict[str, int]) -> list[str]:
    """Why the service is not ready: nobody lives, nobody speaks at head, or work waits that nobody does."""
    if not worker_registry.serving(listed):
        return ["no worker is alive"]
    reasons = []
    speaking = worker_registry.serving(listed, "generate")
    if not speaking:
        reasons.append("no living worker does generate")
    elif all(worker.version < due for worker in speaking):
        reasons.append(f"no worker has reached version {due} yet")
    for role, kinds in worker_registry.ROLES.items():
        count = sum(waiting.get(kind, 0) for kind in kinds)
        if count and role != "generate" and not worker_registry.serving(listed, role):
            reasons.append(f"{count} jobs wait and no living worker does {role}")
    return reasons


def _active(model: Model) -> tuple[ColumnElement[bool], ...]:
    applied = (Job.kind == "edit", Job.status == "applied", Job.version.is_not(None))
    return Job.model == model.fingerprint, *applied


def _waiting(session: Session, model: Model) -> dict[str, int]:
    """Queued jobs by kind."""
    queued = and_(Job.model == model.fingerprint, Job.status == "queued")
    return dict.fromkeys(JOBS, 0) | _counted(session, Job.kind, queued)


def _counts(session: Session, model: Model) -> dict[str, int]:
    """How many jobs wait, run, and were given up."""
    wanted = or_(Job.status.in_(OPEN), and_(Job.status == "failed", Job.dead))
    found = _counted(session, Job.status, and_(Job.model == model.fingerprint, wanted))
    names = {"queued": "queued", "running": "running", "dead": "failed"}
    return {name: found.get(status, 0) for name, status in names.items()}


def _counted(session: Session, column: Any, which: ColumnElement[bool]) -> dict[str, int]:
    rows = session.execute(select(column, func.count()).where(which).group_by(column))
    return {str(value): count for value, count in rows}
