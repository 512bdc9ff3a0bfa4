"""The parts of a worker that act on stores, without a model or an engine."""

from __future__ import annotations

from typing import Any

from service.db.database import Database
from service.jobs.broker import Broker
from service.jobs.job_store import JobStore
from service.jobs.worker_session import WorkerSession
from service.ledger.cached import CachedLedger


class WorkerParts:
    """The session, the job store and the ledger of one worker."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        model: str,
        worker_id: str,
        max_attempts: int = 3,
        **options: Any,
    ) -> None:
        self.database, self.broker, self.model, self.id = database, broker, model, worker_id
        self.session = WorkerSession(database, broker, model, worker_id, **options)
        self.jobs = JobStore(self.session, max_attempts)
        self.ledger = CachedLedger(database, model)
