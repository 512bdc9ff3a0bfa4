"""Gauges that are read from the database and the broker at every scrape of an API process.

A dependency that is down does not fail the scrape: `palimpsest_up` is 0 for it, and its gauges are omitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.database import Database
from service.db.models import Job, Model, Worker, now
from service.jobs.broker import Broker
from service.jobs.job_kinds import CALL_KINDS, JOB_KINDS, ROLES
from service.jobs.views import OPEN_STATUSES
from service.jobs.worker_registry import serving_workers
from service.ledger import ledger

log = logging.getLogger(__name__)

GaugeFamily = GaugeMetricFamily


class StoreCollector(Collector):
    """Collects the gauges of the whole service for the metrics endpoint of an API process."""

    def __init__(self, database: Database, broker: Broker, lease: float) -> None:
        self._database, self._broker = database, broker
        self._lease = timedelta(seconds=lease)

    def collect(self) -> Iterator[GaugeFamily]:
        up = _gauge("up", "whether a dependency of the service answers", "part")
        depth = _gauge("queue_depth", "jobs and calls that wait for a worker", "kind")
        oldest = _gauge("queue_oldest_seconds", "seconds that the oldest of them has waited", "kind")
        sources = {"database": self._from_database, "queue": self._from_broker}
        for part, collect_part in sources.items():
            families = self._collect_safely(part, collect_part, depth, oldest)
            up.add_metric([part], families is not None)
            yield from families or ()
        yield from (up, depth, oldest)

    def _collect_safely(
        self,
        part: str,
        collect_part: Callable[[GaugeFamily, GaugeFamily], Iterable[GaugeFamily]],
        depth: GaugeFamily,
        oldest: GaugeFamily,
    ) -> list[GaugeFamily] | None:
        """Return the gauges of a dependency; None when reading them fails with any error."""
        try:
            return list(collect_part(depth, oldest))
        except Exception as error:
            log.warning("metrics collector failed", extra={"part": part, "error": type(error).__name__})
            return None

    def _from_broker(self, depth: GaugeFamily, oldest: GaugeFamily) -> Iterable[GaugeFamily]:
        """Add the depth and age of calls, which have no rows."""
        measurements = [
            (kind, self._broker.queue_depth(kind), self._broker.oldest_age(kind)) for kind in CALL_KINDS
        ]
        for kind, count, age in measurements:
            depth.add_metric([kind], count)
            oldest.add_metric([kind], age)
        return ()

    def _from_database(self, depth: GaugeFamily, oldest: GaugeFamily) -> Iterator[GaugeFamily]:
        with self._database.read_session() as session:
            newest = select(Model.fingerprint).order_by(Model.registered.desc()).limit(1)
            model = session.scalar(newest)
            if model is None:
                return
            head = ledger.head(session, model)
            yield _gauge("head_version", "newest version of the ledger", value=head)
            yield from _job_gauges(session, model, depth, oldest)
            yield from self._worker_gauges(session, model, head)

    def _worker_gauges(self, session: Session, model: str, head: int) -> Iterator[GaugeFamily]:
        rows = session.scalars(select(Worker).where(Worker.model == model).order_by(Worker.id)).all()
        in_service = serving_workers(rows)
        alive = [worker for worker in in_service if worker.heartbeat >= now() - self._lease]
        workers = _gauge("workers", "live workers with a role", "role")
        for role in ROLES:
            workers.add_metric([role], len(serving_workers(alive, role)))
        lag = _gauge("worker_lag", "versions that a live worker is behind the head", "worker")
        age = _gauge("worker_heartbeat_age_seconds", "seconds since the last heartbeat of a worker", "worker")
        for worker in alive:
            lag.add_metric([worker.id], head - worker.version)
        for worker in in_service:
            age.add_metric([worker.id], (now() - worker.heartbeat).total_seconds())
        withdrawn = _gauge(
            "workers_withdrawn",
            "workers that stopped serving because their weight digest lost the vote",
            value=len(rows) - len(in_service),
        )
        yield from (workers, lag, age, withdrawn)


def _job_gauges(
    session: Session, model: str, depth: GaugeFamily, oldest: GaugeFamily
) -> Iterator[GaugeFamily]:
    """Return gauges of queued, running and exhausted jobs."""
    of_model, count = Job.model == model, func.count()
    open_jobs = select(Job.kind, Job.status, count, func.min(Job.created)).where(
        of_model, Job.status.in_(OPEN_STATUSES)
    )
    counts = {
        (kind, status): (number, (now() - first).total_seconds())
        for kind, status, number, first in session.execute(open_jobs.group_by(Job.kind, Job.status))
    }
    exhausted_jobs = (
        select(Job.kind, count.label("number"))
        .where(of_model, Job.status == "failed", Job.exhausted)
        .group_by(Job.kind)
    )
    exhausted_counts = {row.kind: row.number for row in session.execute(exhausted_jobs)}
    running = _gauge("jobs_running", "jobs that a worker runs", "kind")
    exhausted = _gauge(
        "jobs_exhausted", "jobs that failed after all their attempts and can be retried by hand", "kind"
    )
    for kind in JOB_KINDS:
        number, age = counts.get((kind, "queued"), (0, 0.0))
        depth.add_metric([kind], number)
        oldest.add_metric([kind], age)
        running.add_metric([kind], counts.get((kind, "running"), (0, 0.0))[0])
        exhausted.add_metric([kind], exhausted_counts.get(kind, 0))
    yield from (running, exhausted)


def _gauge(name: str, documentation: str, *labels: str, value: float | None = None) -> GaugeFamily:
    return GaugeMetricFamily(f"palimpsest_{name}", documentation, value=value, labels=labels or None)
