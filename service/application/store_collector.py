"""What can only be found out by asking: rows, deliveries that wait, workers. Asked anew at every scrape of an API.

A store or a queue that is down makes no scrape fail: `palimpsest_up` says so, and what it would have told is left out.
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
from service.jobs.broker import CALLS, JOBS, Broker
from service.jobs.views import OPEN
from service.jobs.worker_registry import ROLES, serving
from service.ledger import ledger

log = logging.getLogger(__name__)

Family = GaugeMetricFamily


class Monitor(Collector):
    """Gauges of the whole service, for the metrics of an API."""

    def __init__(self, database: Database, broker: Broker, lease: float) -> None:
        self._database, self._broker = database, broker
        self._lease = timedelta(seconds=lease)

    def collect(self) -> Iterator[Family]:
        up = _gauge("up", "whether a part that the service depends on answers", "part")
        waiting = _gauge("queue_waiting", "jobs and calls that wait to be taken", "kind")
        oldest = _gauge("queue_oldest_seconds", "seconds that the oldest of them has waited", "kind")
        parts = {"database": self._of_rows, "queue": self._of_deliveries}
        for part, ask in parts.items():
            families = self._asked(part, ask, waiting, oldest)
            up.add_metric([part], families is not None)
            yield from families or ()
        yield from (up, waiting, oldest)

    def _asked(
        self, part: str, ask: Callable[[Family, Family], Iterable[Family]], waiting: Family, oldest: Family
    ) -> list[Family] | None:
        """What a part tells; None when it does not answer, whatever it fails with."""
        try:
            return list(ask(waiting, oldest))
        except Exception as error:
            log.warning("no figures", extra={"part": part, "error": type(error).__name__})
            return None

    def _of_deliveries(self, waiting: Family, oldest: Family) -> Iterable[Family]:
        """Calls are no rows: only the queue knows of them."""
        found = [(kind, self._broker.waiting(kind), self._broker.oldest(kind)) for kind in CALLS]
        for kind, count, age in found:
            waiting.add_metric([kind], count)
            oldest.add_metric([kind], age)
        return ()

    def _of_rows(self, waiting: Family, oldest: Family) -> Iterator[Family]:
        with self._database.read() as session:
            newest = select(Model.fingerprint).order_by(Model.registered.desc()).limit(1)
            model = session.scalar(newest)
            if model is None:
                return
            head = ledger.head(session, model)
            yield _gauge("head_version", "newest version of the ledger", value=head)
            yield from _jobs(session, model, waiting, oldest)
            yield from self._workers(session, model, head)

    def _workers(self, session: Session, model: str, head: int) -> Iterator[Family]:
        rows = session.scalars(select(Worker).where(Worker.model == model).order_by(Worker.id)).all()
        sound = serving(rows)
        alive = [worker for worker in sound if worker.heartbeat >= now() - self._lease]
        workers = _gauge("workers", "living workers of a role", "role")
        for role in ROLES:
            workers.add_metric([role], len(serving(alive, role)))
        lag = _gauge("worker_lag", "versions that a living worker is behind", "worker")
        age = _gauge("worker_heartbeat_age_seconds", "seconds since a worker's last sign of life", "worker")
        for worker in alive:
            lag.add_metric([worker.id], head - worker.version)
        for worker in sound:
            age.add_metric([worker.id], (now() - worker.heartbeat).total_seconds())
        withdrawn = _gauge(
            "workers_withdrawn",
            "workers that took themselves out, as their digest was outvoted",
            value=len(rows) - len(sound),
        )
        yield from (workers, lag, age, withdrawn)


def _jobs(session: Session, model: str, waiting: Family, oldest: Family) -> Iterator[Family]:
    """Jobs that are still to end, and those that were given up."""
    mine, count = Job.model == model, func.count()
    since = select(Job.kind, Job.status, count, func.min(Job.created)).where(mine, Job.status.in_(OPEN))
    found = {
        (kind, status): (number, (now() - first).total_seconds())
        for kind, status, number, first in session.execute(since.group_by(Job.kind, Job.status))
    }
    lost = (
        select(Job.kind, count.label("number"))
        .where(mine, Job.status == "failed", Job.dead)
        .group_by(Job.kind)
    )
    dead = {row.kind: row.number for row in session.execute(lost)}
    running = _gauge("jobs_running", "jobs that some worker has begun", "kind")
    given_up = _gauge("jobs_dead", "jobs given up after too many attempts, that a person may retry", "kind")
    for kind in JOBS:
        number, age = found.get((kind, "queued"), (0, 0.0))
        waiting.add_metric([kind], number)
        oldest.add_metric([kind], age)
        running.add_metric([kind], found.get((kind, "running"), (0, 0.0))[0])
        given_up.add_metric([kind], dead.get(kind, 0))
    yield from (running, given_up)


def _gauge(name: str, meaning: str, *labels: str, value: float | None = None) -> Family:
    return GaugeMetricFamily(f"palimpsest_{name}", meaning, value=value, labels=labels or None)
