"""Retention: delete finished jobs, idempotency keys and attestations after their time, a few rows in each transaction.

An edit in the ledger is never deleted, nor is a job that has not ended. Several processes may delete at once: each row
is locked before it is deleted, and a row that another process has locked is left to that process.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, and_, delete, exists, func, select, tuple_

from service.db.database import Database
from service.db.models import Attestation, IdempotencyKey, Job, JobArtifact, LedgerEntry, StoredFactors, now
from service.jobs.attestations import count_prunable_attestations, prune_attestations
from service.jobs.views import OPEN_STATUSES

BATCH_SIZE = 100  #: rows that one transaction deletes at most
PRUNE_INTERVAL = 3600.0  #: seconds between two searches for expired rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """How long rows are kept; None: for ever."""

    jobs: timedelta | None = None
    idempotency_keys: timedelta | None = None
    attestations: timedelta | None = None  #: of workers that are gone

    @classmethod
    def from_days(cls, jobs: int, idempotency_keys: int, attestations: int) -> Retention:
        """Return the retention of a number of days; 0: for ever."""
        days_of = (jobs, idempotency_keys, attestations)
        return cls(*(timedelta(days=days) if days else None for days in days_of))


class Pruner:
    """Deletes expired rows, one batch at a time. Not thread-safe."""

    def __init__(self, database: Database, retention: Retention) -> None:
        self.database, self.retention = database, retention
        self._searched_at = float("-inf")
        self._after_job: str | None = None  # the last job that this search has seen; None between searches

    def step(self) -> None:
        """Delete one batch of each kind of row when a search is due or under way."""
        if self._after_job is None:
            if time.monotonic() - self._searched_at < PRUNE_INTERVAL:
                return
            self._searched_at, self._after_job = time.monotonic(), ""
        deleted, self._after_job = self._prune_batch(self._after_job)
        if deleted.total():
            log.info("rows pruned", extra=dict(deleted))

    def prune_all(self) -> Counter[str]:
        """Delete all expired rows. Return the number of rows by table."""
        deleted = Counter[str]()
        after_job: str | None = ""
        while after_job is not None:
            batch, after_job = self._prune_batch(after_job)
            deleted += batch
        return deleted

    def count(self) -> Counter[str]:
        """Return the number of rows by table that `prune_all` would delete."""
        conditions = {
            Job: self._expired_jobs(),
            IdempotencyKey: self._expired_idempotency_keys(),
        }
        with self.database.read_session() as session:
            rows = Counter(
                {
                    table.__tablename__: session.scalar(
                        select(func.count()).select_from(table).where(condition)
                    )
                    or 0
                    for table, condition in conditions.items()
                    if condition is not None
                }
            )
            if (kept := self.retention.attestations) is not None:
                rows[Attestation.__tablename__] = count_prunable_attestations(session, now() - kept)
            return rows

    def _prune_batch(self, after_job: str) -> tuple[Counter[str], str | None]:
        """Delete one batch of each table. Return the numbers of rows, and the last job seen; None when nothing is
        left."""
        jobs, last_job = self._prune_jobs(after_job)
        keys = self._prune_idempotency_keys()
        attestations = self._prune_attestations()
        more = last_job is not None or keys == BATCH_SIZE or attestations > 0
        deleted = Counter(
            {
                Job.__tablename__: jobs,
                IdempotencyKey.__tablename__: keys,
                Attestation.__tablename__: attestations,
            }
        )
        return deleted, (last_job or after_job) if more else None

    def _prune_jobs(self, after: str) -> tuple[int, str | None]:
        """Delete expired jobs with an id above `after`, with their artifacts. Return their number, and the last id
        unless it was the last batch."""
        condition = self._expired_jobs()
        if condition is None:
            return 0, None
        expired = select(Job.id).where(condition)
        with self.database.read_session() as session:  # the search holds no lock
            found = session.scalars(expired.where(Job.id > after).order_by(Job.id).limit(BATCH_SIZE)).all()
        if not found:
            return 0, None
        with self.database.write_session() as session:
            # The condition is checked again: a failed job may have been queued again.
            locked = expired.where(Job.id.in_(found)).with_for_update(of=Job, skip_locked=True)
            ids = session.scalars(locked).all()
            session.execute(delete(JobArtifact).where(JobArtifact.job_id.in_(ids)))
            session.execute(delete(Job).where(Job.id.in_(ids)))
        return len(ids), found[-1] if len(found) == BATCH_SIZE else None

    def _prune_idempotency_keys(self) -> int:
        """Delete expired idempotency keys. Return their number."""
        condition = self._expired_idempotency_keys()
        if condition is None:
            return 0
        key = (IdempotencyKey.actor, IdempotencyKey.key)
        with self.database.read_session() as session:
            found = session.execute(select(*key).where(condition).limit(BATCH_SIZE)).all()
        if not found:
            return 0
        with self.database.write_session() as session:
            row = and_(condition, tuple_(*key).in_([tuple(row) for row in found]))
            locked = session.execute(select(*key).where(row).with_for_update(skip_locked=True)).all()
            session.execute(delete(IdempotencyKey).where(tuple_(*key).in_([tuple(row) for row in locked])))
        return len(locked)

    def _prune_attestations(self) -> int:
        """Delete attestations of workers that are gone. Return their number."""
        if self.retention.attestations is None:
            return 0
        before = now() - self.retention.attestations
        with self.database.read_session() as session:  # the search holds no lock
            if not count_prunable_attestations(session, before):
                return 0
        with self.database.write_session() as session:
            return prune_attestations(session, before)

    def _expired_jobs(self) -> ColumnElement[bool] | None:
        """Return the condition for jobs that ended before the retention and are not in the ledger."""
        if self.retention.jobs is None:
            return None
        return and_(
            Job.status.not_in(OPEN_STATUSES),
            Job.ended < now() - self.retention.jobs,
            ~exists().where(LedgerEntry.edit_id == Job.id),
            ~exists().where(StoredFactors.edit_id == Job.id),
        )

    def _expired_idempotency_keys(self) -> ColumnElement[bool] | None:
        if self.retention.idempotency_keys is None:
            return None
        return IdempotencyKey.created < now() - self.retention.idempotency_keys
