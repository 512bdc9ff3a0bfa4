"""What a worker may do with rows: begun once, landed once, ended always."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, update

from service.application import Services
from service.bootstrap import Container
from service.db.database import Database
from service.db.models import Job, JobArtifact, Worker, now
from service.errors import (
    Cancelled,
    CommitOutcomeUnknown,
    Conflict,
    DigestMismatch,
    InvalidInput,
    LeaseLost,
    NotFound,
    Unavailable,
    error_document,
)
from service.jobs import attestations
from service.jobs import worker_session as worker_session_module
from service.jobs.broker import Broker
from service.jobs.memory_broker import MemoryBroker
from service.kit import ids
from service.kit.steps import Phase, Progress
from service.ledger import cached, ledger
from service.ledger.cached import CachedLedger
from service.schemas import EditRequest, EvaluationRequest, TraceRequest
from service.settings import Settings
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts

MODEL = "fingerprint"
RECORD = {"subject": "Eiffel Tower", "prompt": "The {} is located in", "target_new": "Rome"}


@pytest.fixture
def database(container: Container) -> Any:
    return container.database


@pytest.fixture
def broker(container: Container) -> Any:
    return container.broker


@pytest.fixture
def make_worker(database: Database, broker: Broker) -> Any:
    def make(worker: Any = "worker-1", model: Any = MODEL, **options: Any) -> Any:
        worker = WorkerParts(database, broker, model, worker, 3, **options)
        worker.session.register(INFO, tokenizer_json())
        return worker

    return make


@pytest.fixture
def worker(make_worker: Callable[..., WorkerParts]) -> Any:
    return make_worker()


@pytest.fixture
def services(database: Database, broker: Broker, worker: WorkerParts, tmp_path: Path) -> Any:
    return Services(database, broker, Settings(data_dir=tmp_path))


@pytest.fixture
def submit_edit(services: Services) -> Any:
    """Queue an edit and return its id."""

    def ask(subject: str = "Eiffel Tower", target: Any = "Rome", **more: Any) -> Any:
        request = EditRequest(subject=subject, prompt="The {} is located in", target_new=target, **more)
        return services.edits.submit([request], "somebody")[0]["id"]

    return ask


def commit_edit(worker: WorkerParts, edit_id: str, **body: Any) -> Any:
    job = worker.jobs.claim(edit_id)
    return worker.jobs.commit_edit(
        job, worker.ledger.head(), edit_id.encode(), {"seed": 1, **body}, {"seconds": 1.0}
    )


def expire_heartbeat(worker: WorkerParts) -> None:
    """The worker is heard of no more."""
    with worker.database.write_session() as session:
        long_ago = now() - timedelta(hours=1)
        session.execute(update(Worker).where(Worker.id == worker.id).values(heartbeat=long_ago))


def worker_row(worker: WorkerParts, worker_id: str = "worker-1") -> Any:
    with worker.database.read_session() as session:
        return session.get(Worker, worker_id)


def lose_connection_after_commit(
    worker: WorkerParts, monkeypatch: pytest.MonkeyPatch, times: Any = 1
) -> None:
    """The desk's next commits succeed, and their answers are lost."""
    session, left = worker.database.write_session, [times]

    @contextmanager
    def doubtful() -> Iterator[Any]:
        with session() as opened:
            yield opened
        left[0] -= 1
        if left[0] >= 0:
            raise CommitOutcomeUnknown("nobody knows.")

    monkeypatch.setattr(worker.database, "write_session", doubtful)


def raise_unavailable(*_: Any, **__: Any) -> None:
    raise Unavailable("the queue does not answer.")


def last_event(broker: Broker, job_id: str) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in broker.events(job_id)][-1]

    return asyncio.run(listen())


class TestClaim:
    def test_claim(self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services) -> None:
        """A job that waits is begun, and its row says so."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        assert (job.id, job.kind, job.attempt, job.request["target_new"]) == (edit, "edit", 1, "Rome")
        found = services.edits.get(edit)
        assert (found["status"], found["attempts"]) == ("running", 1)
        assert found["started"] is not None

    def test_only_once(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A job that runs is begun by nobody else, nor twice by one worker."""
        edit = submit_edit()
        assert worker.jobs.claim(edit)
        assert worker.jobs.claim(edit) is None
        assert make_worker("worker-2").jobs.claim(edit) is None

    def test_race(self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]) -> None:
        """Of many workers that begin one job at once, one does."""
        edit = submit_edit()
        workers = [make_worker(f"racer-{n}") for n in range(6)]
        barrier = threading.Barrier(len(workers))

        def start(worker: WorkerParts) -> Any:
            barrier.wait()
            return worker.jobs.claim(edit)

        with ThreadPoolExecutor(len(workers)) as pool:
            started = [job for job in pool.map(start, workers) if job]
        assert len(started) == 1

    def test_nothing_to_do(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job that is gone, ended or cancelled is not begun."""
        edit = submit_edit()
        services.edits.revert(edit, "somebody")
        assert worker.jobs.claim(edit) is None
        assert worker.jobs.claim("edit_gone") is None

    def test_other_model(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job for another model waits for a worker that has it."""
        edit = submit_edit()
        assert make_worker("worker-2", model="other").jobs.claim(edit) is None
        assert services.edits.get(edit)["status"] == "queued"

    def test_orphan(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A job whose worker died is begun again; what the dead one still writes is refused."""
        edit = submit_edit()
        stale_job = worker.jobs.claim(edit)
        expire_heartbeat(worker)
        successor = make_worker("worker-2")
        job = successor.jobs.claim(edit)
        assert job.attempt == 2
        for write in (
            lambda: worker.jobs.commit_edit(stale_job, 0, b"x", {}, {}),
            lambda: worker.jobs.finish(stale_job, "rejected", {}),
            lambda: worker.jobs.fail(stale_job, "x"),
            lambda: worker.jobs.report_progress(stale_job, Progress(Phase.RUN, 1, 2)),
            lambda: worker.jobs.requeue(stale_job),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert successor.jobs.commit_edit(job, 0, b"right", {}, {}) == 1
        with pytest.raises(LeaseLost):
            worker.jobs.commit_edit(stale_job, 1, b"x", {}, {})
        assert successor.ledger.head() == 1

    def test_stalled_worker_of_exhausted_job(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A worker that was only frozen while its job was given up has not ended it: what it writes is refused."""
        edit = submit_edit()
        for n in range(3):
            worker = make_worker(f"doomed-{n}")
            late = worker.jobs.claim(edit)
            expire_heartbeat(worker)
        make_worker("worker-2").jobs.claim(edit)
        for write in (
            lambda: worker.jobs.commit_edit(late, 0, b"x", {}, {}),
            lambda: worker.jobs.finish(late, "rejected"),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert services.edits.get(edit)["status"] == "failed"

    def test_request_id(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """A job remembers which request asked for it."""
        ids.request_id.set("req-7")
        try:
            assert worker.jobs.claim(submit_edit()).request_id == "req-7"
        finally:
            ids.request_id.set("")
        assert worker.jobs.claim(submit_edit()).request_id == ""

    def test_orphan_of_the_same_name(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
    ) -> None:
        """A worker that restarts under its old name takes over what its earlier life had begun."""
        edit = submit_edit()
        late = make_worker("same").jobs.claim(edit)
        reborn = make_worker("same")
        assert reborn.jobs.claim(edit).attempt == 2
        with pytest.raises(LeaseLost):
            reborn.jobs.finish(late, "rejected")

    def test_attempts(
        self,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
    ) -> None:
        """A job whose workers keep dying fails with the reason, and is announced as ended."""
        edit = submit_edit()
        for n in range(3):
            worker = make_worker(f"doomed-{n}")
            assert worker.jobs.claim(edit).attempt == n + 1
            expire_heartbeat(worker)
        assert make_worker("worker-2").jobs.claim(edit) is None
        found = services.edits.get(edit)
        assert found["status"] == "failed"
        assert "died 3 times" in found["error"]["detail"]
        assert services.jobs.page(exhausted=True)["items"][0]["id"] == edit
        assert last_event(broker, edit).data == found

    def test_orphan_that_was_cancelled(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        services: Services,
    ) -> None:
        """A cancelled job whose worker died ends as cancelled."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        services.edits.revert(edit, "somebody")
        expire_heartbeat(worker)
        assert make_worker("worker-2").jobs.claim(edit) is None
        assert services.edits.get(edit)["status"] == "cancelled"

    def test_requeue(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services, broker: Broker
    ) -> None:
        """A job put back by a worker that stops waits again, and the attempt does not count."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker.jobs.requeue(worker.jobs.claim(edit))
        assert services.edits.get(edit)["status"] == "queued"
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]
        assert worker.jobs.claim(edit).attempt == 1


class TestNotifyLostJobs:
    def test_lost_notification(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], broker: Broker
    ) -> None:
        """A job whose bell was lost is announced again."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)  # and the taker forgot it
        assert worker.session.notify_lost_jobs() == 1
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]

    def test_dead_worker(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        broker: Broker,
    ) -> None:
        """A running job is announced again when its worker died, and only then."""
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
        """A sole worker takes over at once whatever runs under another name: it has no living neighbour."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        assert make_worker("worker-2").session.notify_lost_jobs() == 0
        reborn = make_worker("worker-3", single_process=True)
        assert reborn.session.notify_lost_jobs() == 1
        assert reborn.jobs.claim(edit).attempt == 2

    def test_quarantined_worker(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """What a worker that took itself out had running may be taken over at once."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        worker.session.quarantine("tired")
        other = make_worker("worker-2")
        assert other.session.notify_lost_jobs() == 1
        assert other.jobs.claim(edit).attempt == 2

    def test_nothing_lost(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Where as many deliveries wait as rows no bell was lost, and none is rung: the sweep of a long queue is cheap."""
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
        """After the queue has lost everything the oldest jobs are rung for first, not all at once."""
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
        """A sweep asks the store as often for many jobs as for one."""
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
        """What a worker that left had running may be taken over at once."""
        edit = submit_edit()
        worker.jobs.claim(edit)
        worker.session.deregister()
        assert make_worker("worker-2").jobs.claim(edit).attempt == 2


class TestCommitEdit:
    def test_commit_edit(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        database: Database,
    ) -> None:
        """An edit lands with its factors, its entry and its row at once, and its end is announced."""
        edit = submit_edit(target_true="Paris")
        assert commit_edit(worker, edit) == 1
        found = services.edits.get(edit)
        assert (found["status"], found["version"], found["result"]) == ("applied", 1, {"seconds": 1.0})
        assert found["ended"] is not None
        assert services.edits.delta(edit) == edit.encode()
        event = last_event(broker, edit)
        assert (event.name, event.data) == ("end", found)
        with database.read_session() as session:
            (entry,) = ledger.entries(session, MODEL)
        assert entry.body == {
            "seed": 1,
            "subject": "Eiffel Tower",
            "prompt": "The {} is located in",
            "target_new": "Rome",
            "target_true": "Paris",
            "factors_sha256": hashlib.sha256(edit.encode()).hexdigest(),
            "model": MODEL,
        }
        assert (entry.actor, entry.edit_id) == ("somebody", edit)

    def test_head_moved(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """An edit that was looked at on an older head does not land, and may try again on the new one."""
        first, second = worker.jobs.claim(submit_edit()), worker.jobs.claim(submit_edit("Colosseum"))
        assert worker.jobs.commit_edit(first, 0, b"1", {}, {}) == 1
        with pytest.raises(Conflict, match="head moved"):
            worker.jobs.commit_edit(second, 0, b"2", {}, {})
        assert worker.ledger.head() == 1
        assert worker.jobs.commit_edit(second, 1, b"2", {}, {}) == 2

    def test_race_at_one_head(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
    ) -> None:
        """Of workers that land on one head at once, one does and every other one has a Conflict."""
        workers = [make_worker(f"racer-{n}") for n in range(4)]
        jobs = [worker.jobs.claim(submit_edit(f"Tower {n}")) for n, worker in enumerate(workers)]
        barrier = threading.Barrier(len(workers))

        def race(pair: Any) -> Any:
            worker, job = pair
            barrier.wait()
            try:
                return worker.jobs.commit_edit(job, 0, job.id.encode(), {}, {})
            except Conflict:
                return "conflict"

        with ThreadPoolExecutor(len(workers)) as pool:
            results = list(pool.map(race, zip(workers, jobs, strict=True)))
        assert sorted(results, key=str) == [1, "conflict", "conflict", "conflict"]

    def test_cancel_first(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A cancel that came before the commit wins: nothing lands."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        services.edits.revert(edit, "somebody")
        with pytest.raises(Cancelled):
            worker.jobs.commit_edit(job, 0, b"x", {}, {})
        assert worker.ledger.head() == 0
        worker.jobs.finish(job, "cancelled")
        assert services.edits.get(edit)["status"] == "cancelled"
        with pytest.raises(Exception, match="only an edit that was applied"):
            services.edits.delta(edit)

    def test_twice(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """An edit lands once: who lands it again is told where it stands."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        assert worker.jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        commit_edit(worker, submit_edit("Colosseum"))
        assert worker.jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        assert worker.ledger.head() == 2

    def test_non_finite_values(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Infinite and undefined figures in a result or a body become null, in the row and in the hash."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        worker.jobs.commit_edit(job, 0, b"x", {"strength": float("nan")}, {"perplexity": float("inf")})
        assert services.edits.get(edit)["result"] == {"perplexity": None}
        assert services.ledger.verify()["ok"]


class TestUnknownCommitOutcome:
    """The database goes away between a commit and its answer."""

    @pytest.fixture
    def job(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> Any:
        return worker.jobs.claim(submit_edit())

    @pytest.mark.parametrize(
        ("end", "status", "head"),
        [
            (lambda worker, job: worker.jobs.commit_edit(job, 0, b"x", {}, {}), "applied", 1),
            (lambda worker, job: worker.jobs.finish(job, "rejected", {}), "rejected", 0),
            (lambda worker, job: worker.jobs.fail(job, "x"), "failed", 0),
        ],
    )
    @pytest.mark.parametrize("again", ["same", "requeue", "fail"])
    def test_end(
        self,
        worker: WorkerParts,
        job: Any,
        broker: Broker,
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
        end: Any,
        status: str,
        head: Any,
        again: Any,
    ) -> None:
        """An end that was written stands, whatever the worker does next, and is announced then."""
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            end(worker, job)
        repeat = {
            "same": end,
            "requeue": lambda worker, job: worker.jobs.requeue(job),
            "fail": lambda worker, job: worker.jobs.fail(job, "y"),
        }
        repeat[again](worker, job)
        found = services.edits.get(job.id)
        assert (found["status"], worker.ledger.head()) == (status, head)
        assert last_event(broker, job.id).data == found
        assert services.ledger.verify()["ok"]

    def test_claim(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A start that was written without the worker knowing is begun again."""
        edit = submit_edit()
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            worker.jobs.claim(edit)
        assert worker.jobs.claim(edit).attempt == 2

    def test_requeue(
        self, worker: WorkerParts, job: Any, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A job that was put back stays so: it is no longer this worker's, and the sweep rings."""
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            worker.jobs.requeue(job)
        with pytest.raises(LeaseLost):
            worker.jobs.requeue(job)
        assert services.edits.get(job.id)["status"] == "queued"

    @pytest.mark.parametrize(
        "write",
        [
            lambda session: session.attest(0, "x"),
            lambda session: session.heartbeat(0),
            lambda session: session.deregister(),
        ],
    )
    def test_the_worker_itself(
        self, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch, write: Any
    ) -> None:
        """What a worker says of itself can be said again."""
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            write(worker.session)
        write(worker.session)

    def test_outvoted(self, make_worker: Callable[..., WorkerParts], monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker that was outvoted and not told is told when it asks again."""
        make_worker("worker-1").session.attest(0, "x")
        loser = make_worker("worker-2")
        lose_connection_after_commit(loser, monkeypatch)
        with pytest.raises(Unavailable):
            loser.session.attest(0, "y")
        with pytest.raises(DigestMismatch):
            loser.session.attest(0, "y")

    def test_broker_outage_after_commit(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What is committed is done, though the queue is down and nobody can be told."""
        first, second, third = (worker.jobs.claim(submit_edit(f"Tower {n}")) for n in range(3))
        for name in ("publish", "notify"):
            monkeypatch.setattr(broker, name, raise_unavailable)
        worker.jobs.commit_edit(first, 0, b"x", {}, {})
        worker.jobs.finish(second, "rejected")
        worker.jobs.requeue(third)
        found = [services.edits.get(job.id)["status"] for job in (first, second, third)]
        assert found == ["applied", "rejected", "queued"]


class TestEnd:
    @pytest.mark.parametrize("status", ["rejected", "cancelled"])
    def test_finish(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        status: str,
    ) -> None:
        """A job that lands nothing ends with its status and figures, and is announced."""
        edit = submit_edit()
        worker.jobs.finish(worker.jobs.claim(edit), status, {"ES": 0.0})
        found = services.edits.get(edit)
        assert (found["status"], found["result"], found["progress"]) == (status, {"ES": 0.0}, None)
        assert last_event(broker, edit).data == found
        assert worker.ledger.head() == 0

    @pytest.mark.parametrize(
        ("error", "status", "told"),
        [
            (InvalidInput("write it so."), "failed", error_document(InvalidInput("write it so."))),
            (RuntimeError("a secret"), "failed", error_document(RuntimeError())),
            (Cancelled("stop"), "cancelled", None),
        ],
    )
    def test_fail(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        error: Any,
        status: str,
        told: Any,
    ) -> None:
        """A job that fails says why; one that was cancelled is called cancelled."""
        edit = submit_edit()
        worker.jobs.fail(worker.jobs.claim(edit), error)
        found = services.edits.get(edit)
        assert (found["status"], found["error"]) == (status, told)

    def test_trace(self, worker: WorkerParts, services: Services) -> None:
        """A trace ends as done, with the version at which it ran."""
        asked = TraceRequest(prompt="The Eiffel Tower is located in", subject="Eiffel Tower")
        trace = services.traces.submit(asked, "somebody")["id"]
        worker.jobs.finish(worker.jobs.claim(trace), "done", {"version": 0, "effects": [1.0]})
        found = services.traces.get(trace)
        assert (found["status"], found["version"], found["result"]["effects"]) == ("done", 0, [1.0])
        assert services.ledger.verify()["ok"]


class TestProgress:
    def test_progress(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services, broker: Broker
    ) -> None:
        """Progress is told to listeners at every step, and to the row now and then."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        for n in range(20):
            worker.jobs.report_progress(job, Progress(Phase.OPTIMIZE, n, 20))
        assert services.edits.get(edit)["progress"] == {"phase": "optimize", "done": 0, "total": 20}
        worker.jobs.finish(job, "rejected", {})

        async def listen() -> Any:
            return [event.data async for event in broker.events(edit)]

        assert [data["done"] for data in asyncio.run(listen())[:-1]] == list(range(20))

    def test_cancel_while_it_runs(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Somebody's cancel is known to the worker at its next question."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        assert not worker.jobs.cancel_requested(job)
        assert services.edits.revert(edit, "somebody")["status"] == "running"
        assert worker.jobs.cancel_requested(job)

    def test_cancel_from_the_row(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """A cancel whose message was lost is found in the row."""
        edit = submit_edit()
        job = worker.jobs.claim(edit)
        with worker.database.write_session() as session:
            session.execute(update(Job).where(Job.id == edit).values(cancel_requested=True))
        worker.jobs.report_progress(job, Progress(Phase.OPTIMIZE, 1, 2))
        assert worker.jobs.cancel_requested(job)


class TestArtifacts:
    @pytest.fixture
    def evaluation(self, services: Services) -> Any:
        return services.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]

    @staticmethod
    def count(database: Database) -> Any:
        with database.read_session() as session:
            return session.scalar(select(func.count()).select_from(JobArtifact))

    def test_artifacts_survive_attempts(
        self, worker: WorkerParts, make_worker: Callable[..., WorkerParts], evaluation: Any
    ) -> None:
        """What an attempt keeps is there for the next one, the newest of each name; one that was taken over keeps no more."""
        stale_job = worker.jobs.claim(evaluation)
        for data in (b"old", b"new\x00"):
            worker.jobs.put_artifact(stale_job, "a", data)
        expire_heartbeat(worker)
        successor = make_worker("worker-2")
        job = successor.jobs.claim(evaluation)
        assert (successor.jobs.get_artifact(job, "a"), successor.jobs.get_artifact(job, "b")) == (
            b"new\x00",
            None,
        )
        with pytest.raises(LeaseLost):
            worker.jobs.put_artifact(stale_job, "a", b"late")
        successor.jobs.put_artifact(job, "b", b"2")
        assert [successor.jobs.get_artifact(job, name) for name in "ab"] == [b"new\x00", b"2"]

    def test_artifacts_belong_to_one_job(
        self, worker: WorkerParts, evaluation: Any, services: Services
    ) -> None:
        """A part belongs to one job."""
        job = worker.jobs.claim(evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        other = services.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]
        assert worker.jobs.get_artifact(worker.jobs.claim(other), "a") is None

    @pytest.mark.parametrize("end", ["done", "cancelled"])
    def test_gone_with_the_job(
        self, worker: WorkerParts, evaluation: Any, database: Database, end: Any
    ) -> None:
        """A job that has ended keeps nothing."""
        job = worker.jobs.claim(evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        assert self.count(database) == 2  # its records, too
        worker.jobs.finish(job, end)
        assert self.count(database) == 0

    def test_cancelled_before_it_began(self, evaluation: Any, database: Database, services: Services) -> None:
        """Nor does one that is cancelled while it waits."""
        services.evaluations.cancel(evaluation)
        assert self.count(database) == 0

    def test_failed(self, worker: WorkerParts, evaluation: Any, services: Services) -> None:
        """A job that failed may be tried again, and goes on with what it kept."""
        job = worker.jobs.claim(evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        worker.jobs.fail(job, "out of memory")
        services.jobs.retry(evaluation, "admin")
        assert worker.jobs.get_artifact(worker.jobs.claim(evaluation), "a") == b"x"

    def test_put_artifact_again(
        self, worker: WorkerParts, evaluation: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A part whose keeping is in doubt is kept again without harm."""
        job = worker.jobs.claim(evaluation)
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            worker.jobs.put_artifact(job, "a", b"x")
        worker.jobs.put_artifact(job, "a", b"x")
        assert worker.jobs.get_artifact(job, "a") == b"x"


class TestCachedLedger:
    def test_associations(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Return the edits active at a version with the bodies of their entries, and their factors."""
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker, a, strength=1.5)
        commit_edit(worker, b)
        services.edits.revert(a, "somebody")
        assert worker.ledger.active_at(0) == []
        assert [x for x, _ in worker.ledger.active_at(2)] == [a, b]
        assert [x for x, _ in worker.ledger.active_at(3)] == [b]
        assert worker.ledger.active_at(1)[0][1]["strength"] == 1.5
        assert worker.ledger.factors_of([b, a]) == {a: a.encode(), b: b.encode()}

    def test_entries_are_read_once(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Only new entries are read, and the active edits are those of the whole ledger."""
        read: list[int] = []
        entries = ledger.entries

        def recording(*args: Any, after: int = 0, **kwargs: Any) -> Any:
            read.append(after)
            return entries(*args, after=after, **kwargs)

        monkeypatch.setattr(ledger, "entries", recording)
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker, a)
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        commit_edit(worker, b)
        services.edits.revert(a, "somebody")
        read.clear()
        assert [x for x, _ in worker.ledger.active_at(3)] == [b]
        assert read == [0]
        assert [x for x, _ in worker.ledger.active_at(2)] == [a, b]
        assert read == [0, 2]

    def test_pages(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A ledger that is longer than a page is read whole, at once and as it grows."""
        monkeypatch.setattr(cached, "PAGE_SIZE", 2)
        edits = [submit_edit(f"Tower {n}") for n in range(9)]
        for number, edit in enumerate(edits[:5], start=1):
            commit_edit(worker, edit)
            if number in (1, 2):
                assert [x for x, _ in worker.ledger.active_at(number)] == edits[:number]
        assert [x for x, _ in worker.ledger.active_at(5)] == edits[:5]
        for edit in edits[5:]:
            commit_edit(worker, edit)
        assert [x for x, _ in worker.ledger.active_at(9)] == edits
        fresh = CachedLedger(worker.database, worker.model)
        assert fresh.active_at(9) == worker.ledger.active_at(9)

    @pytest.mark.parametrize("max_body_bytes", [0, 500])
    def test_bodies_are_bounded_in_bytes(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], max_body_bytes: int
    ) -> None:
        """The cached bodies never exceed the limit, and the results do not depend on it."""
        for n in range(6):
            commit_edit(worker, submit_edit(f"Tower {n}"), note="x" * 50)
        small = CachedLedger(worker.database, worker.model, max_body_bytes)
        for version in (6, 3, 6, 0):
            assert small.active_at(version) == worker.ledger.active_at(version)
            sizes = [len(ledger.canonical_json(body)) for body, _ in small._bodies.values()]
            assert sum(sizes) == small._body_bytes <= max_body_bytes
        assert len(worker.ledger._bodies) == 6

    def test_a_restored_ledger_is_read_again(
        self, worker: WorkerParts, submit_edit: Callable[..., Any]
    ) -> None:
        """When the newest cached entry changed or is missing, because a backup was restored, nothing cached is used."""
        a = submit_edit()
        commit_edit(worker, a)
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        (entry,) = worker.ledger._index
        worker.ledger._index = [replace(entry, hash="0" * 64, edit_id="another")]
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        worker.ledger._index = [entry, replace(entry, version=2)]
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        with pytest.raises(NotFound):
            worker.ledger.active_at(2)

    @pytest.mark.parametrize("version", [-1, 1])
    def test_unknown_version(self, worker: WorkerParts, version: int) -> None:
        """A version that does not exist raises NotFound."""
        with pytest.raises(NotFound, match="no version"):
            worker.ledger.active_at(version)


class TestVote:
    """Whose weights are right when workers differ."""

    def replicas(self, services: Services) -> Any:
        return {
            r["worker"]: (r["digest"], r["withdrawn"] is None) for r in services.ledger.verify()["replicas"]
        }

    def test_attest(self, worker: WorkerParts, services: Services) -> None:
        """A worker's digest of a version is listed with where it stands, and saying it again changes nothing."""
        worker.session.attest(0, "x")
        first = services.ledger.verify()["replicas"]
        worker.session.attest(0, "x")
        assert services.ledger.verify()["replicas"] == first
        (replica,) = first
        assert (replica["worker"], replica["digest"], replica["device"]) == ("worker-1", "x", "cpu")
        assert replica["withdrawn"] is None

    def test_minority(self, make_worker: Callable[..., WorkerParts], services: Services) -> None:
        """Who is in the minority is told so, takes its word back, and is listed with the reason."""
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
        """Of two that differ the one that spoke first is believed."""
        make_worker("worker-1").session.attest(0, "x")
        with pytest.raises(DigestMismatch):
            make_worker("worker-2").session.attest(0, "y")

    def test_majority_comes_later(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Who spoke first and is outnumbered later learns of it when it speaks again."""
        first, others = make_worker("worker-1"), [make_worker(f"worker-{n}") for n in (2, 3)]
        first.session.attest(0, "wrong")
        with first.database.write_session() as session:
            for other in others:
                attestations.attest(session, MODEL, 0, other.id, "right", "cpu")
        with pytest.raises(DigestMismatch):
            first.session.attest(0, "wrong")

    def test_alive_workers_outvote_dead_ones(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Who is gone cannot outvote the living; between living ones that differ they decide."""
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
        """Versions of one state are one vote: after a revert the base's digest must come back."""
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
        """Devices of another kind have bytes, and a vote, of their own."""
        make_worker("worker-1").session.attest(0, "x")
        other = WorkerParts(database, broker, MODEL, "worker-2")
        other.session.register({**INFO, "device": "cuda"}, tokenizer_json())
        other.session.attest(0, "y")

    def test_concurrent_attestations(self, make_worker: Callable[..., WorkerParts]) -> None:
        """Of two that differ and speak at once one is believed and one is not."""
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
        """A worker that was thought dead and struck out is listed again with its next heartbeat, as it registered."""
        worker_session_module.delete_all_workers(database)
        worker.session.heartbeat(3, "x")
        found = worker_row(worker)
        assert (found.version, found.digest, found.model) == (3, "x", MODEL)

    def test_heartbeat_after_deregister(self, worker: WorkerParts) -> None:
        """A late heartbeat does not bring back a worker that has left."""
        worker.session.deregister()
        worker.session.heartbeat(3, "x")
        assert worker_row(worker) is None

    def test_quarantined_stays_listed(self, worker: WorkerParts) -> None:
        """A worker that took itself out stays listed when it leaves, and is no longer after a day."""
        worker.session.quarantine("tired")
        worker.session.heartbeat(1, "x")
        worker.session.deregister()
        assert worker_row(worker).reason == "tired"

    def test_prune(self, worker: WorkerParts, make_worker: Callable[..., WorkerParts]) -> None:
        """Workers silent for a day are struck out by the sweep; those silent for an hour are not."""
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
        """A worker can ask who else lives with another model; the dead and its own kind are none."""
        make_worker("kin")
        assert worker.session.foreign_workers() == []
        other = make_worker("other-1", model="other")
        (told,) = worker.session.foreign_workers()
        assert "other-1" in told
        expire_heartbeat(other)
        assert worker.session.foreign_workers() == []


def test_workers_register_at_once(make_worker: Callable[..., WorkerParts], database: Database) -> None:
    """Workers that bring up one model at once all register."""
    workers = [WorkerParts(database, MemoryBroker(), "new", f"w{n}") for n in range(6)]
    barrier = threading.Barrier(len(workers))

    def register(worker: WorkerParts) -> None:
        barrier.wait()
        worker.session.register(INFO, tokenizer_json())

    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(register, workers))
    with database.read_session() as session:
        assert session.query(Worker).count() == 6


def test_claim_refreshes_heartbeat(
    make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
) -> None:
    """A worker that slept beyond its lease and begins a job is no dead one, whatever its last heartbeat says."""
    first, second = make_worker("worker-1"), make_worker("worker-2")
    expire_heartbeat(first)
    edit = submit_edit()
    assert first.jobs.claim(edit) is not None
    assert second.jobs.claim(edit) is None
