"""WorkerSession: registration, attestations, and the sweep for lost jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, update

from service.application import Services
from service.db.database import Database
from service.db.models import Worker, now
from service.errors import (
    DigestMismatch,
)
from service.jobs import attestations
from service.jobs import worker_session as worker_session_module
from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker
from tests.support.job_rows import (
    MODEL,
    claim_job,
    commit_edit,
    expire_heartbeat,
    raise_unavailable,
    worker_row,
)
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts


class TestNotifyLostJobs:
    def test_lost_notification(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], broker: Broker
    ) -> None:
        """A queued job whose notification was lost is notified again."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)  # received and not claimed
        assert worker.session.notify_lost_jobs() == 1
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]

    def test_dead_worker(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        broker: Broker,
    ) -> None:
        """A running job is notified again when its worker died, and only then."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker.jobs.claim(edit)
        other = make_worker("worker-2")
        assert other.session.notify_lost_jobs() == 0
        expire_heartbeat(worker)
        assert other.session.notify_lost_jobs() == 1
        worker.session.heartbeat(0)
        assert other.session.notify_lost_jobs() == 0

    def test_single_process(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """In a single process, a job that runs under another worker id is an orphan at once."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        assert make_worker("worker-2").session.notify_lost_jobs() == 0
        reborn = make_worker("worker-3", single_process=True)
        assert reborn.session.notify_lost_jobs() == 1
        assert claim_job(reborn, edit).attempt == 2

    def test_quarantined_worker(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """The running jobs of a quarantined worker are orphans at once."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        worker.session.quarantine("tired")
        other = make_worker("worker-2")
        assert other.session.notify_lost_jobs() == 1
        assert claim_job(other, edit).attempt == 2

    def test_nothing_lost(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With as many pending deliveries as queued rows, the sweep notifies for none."""
        for n in range(3):
            submit_edit(f"Tower {n}")
        monkeypatch.setattr(broker, "notify", raise_unavailable)
        assert worker.session.notify_lost_jobs() == 0

    def test_bounded(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A sweep notifies for at most MAX_LOST_JOBS_NOTIFIED jobs, the oldest first."""
        monkeypatch.setattr(worker_session_module, "MAX_LOST_JOBS_NOTIFIED", 2)
        edits = [submit_edit(f"Tower {n}") for n in range(3)]
        broker.receive(["edit"], 9, 0)
        assert worker.session.notify_lost_jobs() == 2
        assert [d.job_id for d in broker.receive(["edit"], 9, 0)] == edits[:2]

    def test_few_statements(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        database: Database,
    ) -> None:
        """The number of statements of a sweep does not depend on the number of jobs."""
        for n in range(20):
            make_worker(f"worker-{n}").jobs.claim(submit_edit(f"Tower {n}"))
        worker.session.notify_lost_jobs()
        asked = []
        listen = lambda *args: asked.append(args[2])  # noqa: E731
        event.listen(database.engine, "before_cursor_execute", listen)
        worker.session.notify_lost_jobs()
        event.remove(database.engine, "before_cursor_execute", listen)
        assert sum(statement.startswith("SELECT") for statement in asked) == 1

    def test_deregistered_worker(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """The running jobs of a deregistered worker are orphans at once."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        worker.session.deregister()
        assert claim_job(make_worker("worker-2"), edit).attempt == 2


class TestVote:
    """The majority vote over weight digests."""

    def replicas(self, services: Services) -> Any:
        return {
            r["worker"]: (r["digest"], r["withdrawn"] is None) for r in services.ledger.verify()["replicas"]
        }

    def test_attest(self, worker: WorkerParts, services: Services) -> None:
        """An attestation is listed with its device, and repeating it changes nothing."""
        worker.session.attest(0, "x")
        first = services.ledger.verify()["replicas"]
        worker.session.attest(0, "x")
        assert services.ledger.verify()["replicas"] == first
        (replica,) = first
        assert (replica["worker"], replica["digest"], replica["device"]) == ("worker-1", "x", "cpu")
        assert replica["withdrawn"] is None

    def test_minority(self, make_worker: Callable[..., WorkerParts], services: Services) -> None:
        """A worker in the minority raises DigestMismatch, is quarantined, and is listed with the reason."""
        for n in (1, 2):
            make_worker(f"worker-{n}").session.attest(0, "right")
        odd = make_worker("worker-3")
        with pytest.raises(DigestMismatch, match="digest wrong and those of the others right"):
            odd.session.attest(0, "wrong")
        odd.session.deregister()
        assert self.replicas(services) == {
            "worker-1": ("right", True), "worker-2": ("right", True), "worker-3": ("wrong", False),
        }  # fmt: skip
        assert services.ledger.verify()["ok"]
        shown = {worker["id"]: worker for worker in services.models.describe()["workers"]}
        assert shown["worker-3"]["state"] == "withdrawn"
        assert "digest wrong" in shown["worker-3"]["reason"]
        assert [shown[f"worker-{n}"]["state"] for n in (1, 2)] == ["serving"] * 2

    def test_first_of_two(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Of two workers that differ, the first attestation wins."""
        make_worker("worker-1").session.attest(0, "x")
        with pytest.raises(DigestMismatch):
            make_worker("worker-2").session.attest(0, "y")

    def test_majority_comes_later(self, make_worker: Callable[..., WorkerParts]) -> None:
        """A worker that attested first and is then outvoted raises DigestMismatch at its next attestation."""
        first, others = make_worker("worker-1"), [make_worker(f"worker-{n}") for n in (2, 3)]
        first.session.attest(0, "wrong")
        with first.database.write_session() as session:
            for other in others:
                attestations.attest(session, MODEL, 0, other.id, "right", "cpu")
        with pytest.raises(DigestMismatch):
            first.session.attest(0, "wrong")

    def test_alive_workers_outvote_dead_ones(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Dead workers do not outvote live ones; they decide between live workers that differ."""
        for n in range(3):
            gone = make_worker(f"gone-{n}")
            gone.session.attest(0, "x")
            gone.session.deregister()
        make_worker("worker-1").session.attest(0, "y")
        make_worker("worker-2").session.attest(0, "x")
        with pytest.raises(DigestMismatch):
            make_worker("worker-1").session.attest(0, "y")

    def test_one_state_one_vote(
        self,
        make_worker: Callable[..., WorkerParts],
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
    ) -> None:
        """Versions with the same state share one vote: after a revert the digest must be that of the base."""
        worker.session.attest(0, "base")
        edit = submit_edit()
        commit_edit(worker, edit)
        services.edits.revert(edit, "somebody")
        worker.session.attest(1, "edited")
        worker.session.attest(2, "base")
        with pytest.raises(DigestMismatch):
            make_worker("worker-2").session.attest(2, "other")
        make_worker("worker-3").session.attest(1, "edited")

    def test_other_device(
        self, make_worker: Callable[..., WorkerParts], database: Database, broker: Broker
    ) -> None:
        """Each kind of device has a vote of its own."""
        make_worker("worker-1").session.attest(0, "x")
        other = WorkerParts(database, broker, MODEL, "worker-2")
        other.session.register({**INFO, "device": "cuda"}, tokenizer_json())
        other.session.attest(0, "y")

    def test_concurrent_attestations(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Of concurrent attestations that differ, exactly one wins."""
        racers, barrier = [make_worker(f"racer-{n}") for n in range(4)], threading.Barrier(4)

        def speak(worker: WorkerParts) -> Any:
            barrier.wait()
            try:
                worker.session.attest(0, worker.id)
                return True
            except DigestMismatch:
                return False

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(speak, racers)) == 1


class TestWorkers:
    def test_pruned_while_alive(self, worker: WorkerParts, broker: Broker, database: Database) -> None:
        """A heartbeat inserts the worker's row again if it was deleted."""
        worker_session_module.delete_all_workers(database)
        worker.session.heartbeat(3, "x")
        found = worker_row(worker)
        assert (found.version, found.digest, found.model) == (3, "x", MODEL)

    def test_heartbeat_after_deregister(self, worker: WorkerParts) -> None:
        """A heartbeat after deregister does not insert the row again."""
        worker.session.deregister()
        worker.session.heartbeat(3, "x")
        assert worker_row(worker) is None

    def test_quarantined_stays_listed(self, worker: WorkerParts) -> None:
        """The row of a quarantined worker survives deregister."""
        worker.session.quarantine("tired")
        worker.session.heartbeat(1, "x")
        worker.session.deregister()
        assert worker_row(worker).reason == "tired"

    def test_prune(self, worker: WorkerParts, make_worker: Callable[..., WorkerParts]) -> None:
        """The sweep deletes workers without a heartbeat for a day, and not those without one for an hour."""
        for name, hours in (("long-gone", 25), ("gone", 1)):
            make_worker(name)
            with worker.database.write_session() as session:
                then = now() - timedelta(hours=hours)
                session.execute(update(Worker).where(Worker.id == name).values(heartbeat=then))
        worker.session.notify_lost_jobs()
        assert (worker_row(worker, "long-gone"), worker_row(worker, "gone") is not None) == (
            None,
            True,
        )

    def test_foreign_workers(self, worker: WorkerParts, make_worker: Callable[..., WorkerParts]) -> None:
        """Foreign workers are live workers of another model."""
        make_worker("kin")
        assert worker.session.foreign_workers() == []
        other = make_worker("other-1", model="other")
        (told,) = worker.session.foreign_workers()
        assert "other-1" in told
        expire_heartbeat(other)
        assert worker.session.foreign_workers() == []


def test_workers_register_at_once(make_worker: Callable[..., WorkerParts], database: Database) -> None:
    """Concurrent registrations of one model all succeed."""
    workers = [WorkerParts(database, MemoryBroker(), "new", f"w{n}") for n in range(6)]
    barrier = threading.Barrier(len(workers))

    def register(worker: WorkerParts) -> None:
        barrier.wait()
        worker.session.register(INFO, tokenizer_json())

    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(register, workers))
    with database.read_session() as session:
        assert session.query(Worker).count() == 6
