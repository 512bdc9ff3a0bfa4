"""The gauges that are read at every scrape: service.application.store_collector."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.application.store_collector import StoreCollector
from service.db.database import Database
from service.db.models import Job, Worker, now
from service.errors import Unavailable
from service.jobs.memory_broker import MemoryBroker
from service.kit.ids import new_id
from service.ledger import audit
from service.ledger.audit_coverage import EDIT
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts

LEASE = 30.0


class MonitorFixture:
    """A database with one worker, and the gauges of a scrape."""

    def __init__(self, database: Database) -> None:
        self.database, self.broker = database, MemoryBroker()
        self.worker_parts = self.register_worker("worker-1")

    def register_worker(self, name: str, *roles: str) -> WorkerParts:
        worker_parts = WorkerParts(self.database, self.broker, "f" * 64, name)
        worker_parts.session.register(INFO, tokenizer_json(), roles)
        return worker_parts

    def add_queued_edit(self, subject: str = "Eiffel Tower") -> str:
        """Insert a queued edit."""
        asked = {"subject": subject, "prompt": "The {} is located in", "target_new": "Rome"}
        row = {"id": new_id("edit"), "kind": "edit", "model": self.worker_parts.model, "status": "queued"}
        times = {"created": now(), "updated": now()}
        with self.database.write_session() as session:
            session.add(Job(**row, **times, request=asked, actor="somebody", subject=subject))
            audit.append(session, EDIT, [(row["id"],)])
        return row["id"]

    def update_row(self, table: Any, id: str, **values: Any) -> None:
        with self.database.write_session() as session:
            session.execute(update(table).where(table.id == id).values(values))

    def scrape(self) -> dict[tuple[str, ...], float]:
        """Return the value of each gauge by its name and label values."""
        monitor = StoreCollector(self.database, self.broker, LEASE)
        return {
            (sample.name.removeprefix("palimpsest_"), *sample.labels.values()): sample.value
            for family in monitor.collect()
            for sample in family.samples
        }


@pytest.fixture
def monitor_fixture(database: Database) -> MonitorFixture:
    return MonitorFixture(database)


def test_jobs_by_kind(monitor_fixture: MonitorFixture) -> None:
    """Queued and running jobs are counted separately by kind; a kind without jobs is 0."""
    monitor_fixture.add_queued_edit("Big Ben")
    assert monitor_fixture.worker_parts.jobs.claim(monitor_fixture.add_queued_edit())
    found = monitor_fixture.scrape()
    assert found["queue_depth", "edit"] == found["jobs_running", "edit"] == 1
    assert (
        found["queue_depth", "trace"]
        == found["jobs_running", "trace"]
        == found["jobs_exhausted", "edit"]
        == 0
    )


def test_the_oldest_is_the_one_that_waits(monitor_fixture: MonitorFixture) -> None:
    """`queue_oldest_seconds` is the age of the oldest queued job, and 0 without queued jobs."""
    assert monitor_fixture.scrape()["queue_oldest_seconds", "edit"] == 0
    monitor_fixture.update_row(Job, monitor_fixture.add_queued_edit(), created=now() - timedelta(hours=1))
    monitor_fixture.add_queued_edit("Big Ben")
    assert monitor_fixture.scrape()["queue_oldest_seconds", "edit"] >= 3600


def test_exhausted_jobs(monitor_fixture: MonitorFixture) -> None:
    """`jobs_exhausted` counts jobs that ran out of attempts, and no other failed jobs."""
    monitor_fixture.update_row(Job, monitor_fixture.add_queued_edit(), status="failed", exhausted=True)
    monitor_fixture.update_row(Job, monitor_fixture.add_queued_edit("Big Ben"), status="failed")
    assert monitor_fixture.scrape()["jobs_exhausted", "edit"] == 1


def test_calls_are_counted_by_the_broker(monitor_fixture: MonitorFixture) -> None:
    """The depth and age of queued generations are read from the broker, because they have no rows."""
    monitor_fixture.broker.send_call("generate", {})
    monitor_fixture.broker.send_call("generate", {})
    found = monitor_fixture.scrape()
    assert (found["queue_depth", "generate"], found["queue_depth", "compare"]) == (2, 0)
    assert found["queue_oldest_seconds", "generate"] > 0


def test_workers_by_role(monitor_fixture: MonitorFixture) -> None:
    """A worker counts for its roles, or for all roles if it has none; a role without workers is 0."""
    monitor_fixture.worker_parts.session.deregister()
    assert monitor_fixture.scrape()["workers", "edit"] == 0
    monitor_fixture.register_worker("worker-2", "generate")
    assert monitor_fixture.scrape()["workers", "generate"] == 1
    assert monitor_fixture.scrape()["workers", "edit"] == 0
    monitor_fixture.register_worker("worker-3")
    assert monitor_fixture.scrape()["workers", "generate"] == 2
    assert monitor_fixture.scrape()["workers", "edit"] == 1


def test_worker_without_heartbeat_is_not_alive(monitor_fixture: MonitorFixture) -> None:
    """A worker whose lease has expired counts for no role and has no lag; its heartbeat age is reported."""
    monitor_fixture.update_row(Worker, "worker-1", heartbeat=now() - timedelta(seconds=LEASE + 10))
    found = monitor_fixture.scrape()
    assert found["workers", "generate"] == 0
    assert ("worker_lag", "worker-1") not in found
    assert found["worker_heartbeat_age_seconds", "worker-1"] > LEASE


def test_lag_is_the_distance_to_head(monitor_fixture: MonitorFixture) -> None:
    """`worker_lag` is the number of versions between the worker and head."""
    job = monitor_fixture.worker_parts.jobs.claim(monitor_fixture.add_queued_edit())
    assert job is not None
    monitor_fixture.worker_parts.jobs.commit_edit(job, 0, b"factors", {}, {})
    assert monitor_fixture.scrape()["head_version",] == 1
    assert monitor_fixture.scrape()["worker_lag", "worker-1"] == 1
    monitor_fixture.worker_parts.session.heartbeat(1, "digest")
    assert monitor_fixture.scrape()["worker_lag", "worker-1"] == 0


def test_quarantined_workers(monitor_fixture: MonitorFixture) -> None:
    """A withdrawn worker counts as withdrawn, not for its roles, and has no heartbeat age."""
    monitor_fixture.update_row(Worker, "worker-1", reason="its digest was outvoted")
    found = monitor_fixture.scrape()
    assert (found["workers_withdrawn",], found["workers", "generate"]) == (1, 0)
    assert ("worker_heartbeat_age_seconds", "worker-1") not in found


def test_a_queue_that_is_down_fails_no_scrape(
    monitor_fixture: MonitorFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the broker is down `up` is 0 for the queue, and the gauges of the database are still reported."""

    def down(kind: str) -> int:
        raise Unavailable("the queue does not answer.")

    monkeypatch.setattr(monitor_fixture.broker, "queue_depth", down)
    found = monitor_fixture.scrape()
    assert (found["up", "queue"], found["up", "database"]) == (0, 1)
    assert ("queue_depth", "generate") not in found
    assert found["queue_depth", "edit"] == 0


def test_a_store_that_is_down_fails_no_scrape(tmp_path: Path) -> None:
    """When the database is down `up` is 0 for it, and the gauges of the broker are still reported."""
    database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'missing.sqlite3'}")
    found = list(StoreCollector(database, MemoryBroker(), LEASE).collect())
    values = {(f.name, *s.labels.values()): s.value for f in found for s in f.samples}
    assert values["palimpsest_up", "database"] == 0
    assert values["palimpsest_up", "queue"] == 1
    assert values["palimpsest_queue_depth", "generate"] == 0
    database.close()


def test_empty_database(database: Database) -> None:
    """With an empty database `up` is 1 and there is no head version."""
    found = {f.name: f for f in StoreCollector(database, MemoryBroker(), LEASE).collect()}
    assert "palimpsest_head_version" not in found
    assert {s.labels["part"]: s.value for s in found["palimpsest_up"].samples} == {"database": 1, "queue": 1}
