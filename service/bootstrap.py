"""The composition root: choose SQLite or PostgreSQL, and the in-process broker or Redis. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from service.application import Services
from service.db.database import Database
from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker
from service.jobs.retention import Retention
from service.kit import crash_points
from service.settings import Settings

WORKER_POOL = {
    "pool_size": 5,
    "max_overflow": 5,
}  #: connections of a worker: few threads of it use the database


@dataclass(frozen=True)
class Container:
    """The parts of a process. `single_process`: no other process shares the broker.

    `worker_database` is the same database with connections of its own, so that requests cannot take the connections
    that the heartbeat and the commits of a worker need.
    """

    database: Database
    worker_database: Database
    broker: Broker
    services: Services
    single_process: bool

    def close(self) -> None:
        self.broker.close()
        self.database.close()
        self.worker_database.close()


def build_container(settings: Settings) -> Container:
    """Return the parts for the settings. Opens no connection; the caller runs `database.migrate()`."""
    crash_points.arm(settings.crash_at)
    database = open_database(settings)
    broker = _open_broker(settings)
    return Container(
        database,
        database.with_own_pool(**WORKER_POOL),
        broker,
        Services(database, broker, settings),
        single_process=settings.redis_url is None,
    )


def open_database(settings: Settings) -> Database:
    """Return the database only. Raises Misconfigured if the data folder cannot be created."""
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(
            f"the data folder cannot be created: {error}. Set PALIMPSEST_DATA_DIR to another folder."
        ) from None
    return Database(settings.resolved_database_url(), settings.data_dir, settings.ledger_key)


def retention(settings: Settings) -> Retention:
    """Return how long rows are kept."""
    return Retention.from_days(
        settings.job_retention_days,
        settings.idempotency_key_retention_days,
        settings.attestation_retention_days,
    )


def _open_broker(settings: Settings) -> Broker:
    if settings.redis_url is None:
        return MemoryBroker()
    from service.jobs.redis_broker import RedisBroker  # single-process mode does not need the Redis client

    return RedisBroker(settings.redis_url, prefix=settings.redis_prefix, lease=settings.worker_timeout)
