"""The one place that chooses the parts: SQLite or PostgreSQL, in-process or Redis. Free of torch at import."""

from __future__ import annotations

from dataclasses import dataclass

from service.application import Services
from service.db.database import Database
from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker
from service.kit import crash_points
from service.settings import Settings


@dataclass(frozen=True)
class Container:
    """What a door needs. `sole`: no other process shares this work."""

    database: Database
    broker: Broker
    services: Services
    single_process: bool

    def close(self) -> None:
        self.broker.close()
        self.database.close()


def build_container(settings: Settings) -> Container:
    """Settings to parts. Opens no connection yet; `database.migrate()` is for whoever starts the service."""
    crash_points.arm(settings.crash_at)
    database = open_database(settings)
    broker = _open_broker(settings)
    return Container(
        database, broker, Services(database, broker, settings), single_process=settings.redis_url is None
    )


def open_database(settings: Settings) -> Database:
    """The store alone, for whoever needs no more."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(
            f"the data folder cannot be made: {error}. Set PALIMPSEST_DATA_DIR to another."
        ) from None
    return Database(settings.resolved_database_url())


def _open_broker(settings: Settings) -> Broker:
    if settings.redis_url is None:
        return MemoryBroker()
    from service.jobs.redis_broker import RedisBroker  # the embedded wiring does without the client

    return RedisBroker(settings.redis_url, prefix=settings.redis_prefix, lease=settings.worker_timeout)
