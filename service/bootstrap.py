"""The one place that chooses the parts: SQLite or PostgreSQL, in-process or Redis. Free of torch at import."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import Misconfigured
from service.jobs.broker import Broker
from service.jobs.memory import MemoryBroker
from service.operations import Operations
from service.settings import Settings
from service.store.database import Database


@dataclass(frozen=True)
class Wired:
    """What a door needs."""

    database: Database
    broker: Broker
    operations: Operations

    def close(self) -> None:
        self.broker.close()
        self.database.close()


def wire(settings: Settings) -> Wired:
    """Settings to parts. Opens no connection yet; `database.migrate()` is for whoever starts the service."""
    broker = _broker(settings)
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(
            f"the data folder cannot be made: {error}. Set PALIMPSEST_DATA to another."
        ) from None
    database = Database(settings.database())
    return Wired(database, broker, Operations(database, broker, settings))


def _broker(settings: Settings) -> Broker:
    if settings.redis_url is not None:
        raise Misconfigured(
            "Redis for several workers comes with the next release: leave PALIMPSEST_REDIS_URL unset."
        )
    return MemoryBroker()
