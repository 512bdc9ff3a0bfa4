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
from service.errors import Cancelled, Conflict, DigestMismatch, InvalidInput, LeaseLost, NotFound, Unavailable
from service.jobs import attestations
from service.jobs import job_store as worker_jobs_module
from service.jobs.broker import Broker
from service.jobs.job_store import WorkerJobs
from service.jobs.memory_broker import MemoryBroker
from service.kit import ids
from service.kit.steps import Progress
from service.ledger import ledger
from service.schemas import EditRequest, EvaluationRequest, TraceRequest
from service.settings import Settings
from tests.support.served_model import INFO, tokenizer_json

MODEL = "fingerprint"
RECORD = {"subject": "Eiffel Tower", "prompt": "The {} is located in", "target_new": "Rome"}


@pytest.fixture
def database(container: Container) -> Any:
    return container.database


@pytest.fixture
def broker(container: Container) -> Any:
    return container.broker


@pytest.fixture
def make_worker_jobs(database: Database, broker: Broker) -> Any:
    def make(worker: Any = "worker-1", model: Any = MODEL, **options: Any) -> Any:
        worker_jobs = WorkerJobs(database, broker, model, worker, 3, **options)
        worker_jobs.register(INFO, tokenizer_json())
        return worker_jobs

    return make


@pytest.fixture
def worker_jobs(make_worker_jobs: Callable[..., WorkerJobs]) -> Any:
    return make_worker_jobs()


@pytest.fixture
def services(database: Database, broker: Broker, worker_jobs: WorkerJobs, tmp_path: Path) -> Any:
    return Services(database, broker, Settings(data_dir=tmp_path))


@pytest.fixture
def submit_edit(services: Services) -> Any:
    """Queue an edit and return its id."""

    def ask(subject: str = "Eiffel Tower", target: Any = "Rome", **more: Any) -> Any:
        request = EditRequest(subject=subject, prompt="The {} is located in", target_new=target, **more)
        return services.edits.submit([request], "somebody")[0]["id"]

    return ask


def commit_edit(worker_jobs: WorkerJobs, edit_id: str, **body: Any) -> Any:
    job = worker_jobs.claim(edit_id)
    return worker_jobs.commit_edit(
        job, worker_jobs.head(), edit_id.encode(), {"seed": 1, **body}, {"seconds": 1.0}
    )


def expire_heartbeat(worker_jobs: WorkerJobs) -> None:
    """The worker is heard of no more."""
    with worker_jobs.database.write_session() as session:
        long_ago = now() - timedelta(hours=1)
        session.execute(update(Worker).where(Worker.id == worker_jobs.worker).values(heartbeat=long_ago))


def worker_row(worker_jobs: WorkerJobs, worker: Any = "worker-1") -> Any:
    with worker_jobs.database.read_session() as session:
        return session.get(Worker, worker)


def lose_connection_after_commit(
    worker_jobs: WorkerJobs, monkeypatch: pytest.MonkeyPatch, times: Any = 1
) -> None:
    """The desk's next commits succeed, and their answers are lost."""
    session, left = worker_jobs.database.write_session, [times]

    @contextmanager
    def doubtful() -> Iterator[Any]:
        with session() as opened:
            yield opened
        left[0] -= 1
        if left[0] >= 0:
            raise Unavailable("nobody knows.", outcome="unknown")

    monkeypatch.setattr(worker_jobs.database, "write_session", doubtful)


def raise_unavailable(*_: Any, **__: Any) -> None:
    raise Unavailable("the queue does not answer.")


def last_event(broker: Broker, job_id: str) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in broker.events(job_id)][-1]

    return asyncio.run(listen())


class TestClaim:
    def test_claim(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job that waits is begun, and its row says so."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        assert (job.id, job.kind, job.attempt, job.request["target_new"]) == (edit, "edit", 1, "Rome")
        found = services.edits.get(edit)
        assert (found["status"], found["attempts"]) == ("running", 1)
        assert found["started"] is not None

    def test_only_once(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A job that runs is begun by nobody else, nor twice by one worker."""
        edit = submit_edit()
        assert worker_jobs.claim(edit)
        assert worker_jobs.claim(edit) is None
        assert make_worker_jobs("worker-2").claim(edit) is None

    def test_race(self, make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any]) -> None:
        """Of many workers that begin one job at once, one does."""
        edit = submit_edit()
        all_worker_jobs = [make_worker_jobs(f"racer-{n}") for n in range(6)]
        barrier = threading.Barrier(len(all_worker_jobs))

        def start(worker_jobs: WorkerJobs) -> Any:
            barrier.wait()
            return worker_jobs.claim(edit)

        with ThreadPoolExecutor(len(all_worker_jobs)) as pool:
            started = [job for job in pool.map(start, all_worker_jobs) if job]
        assert len(started) == 1

    def test_nothing_to_do(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job that is gone, ended or cancelled is not begun."""
        edit = submit_edit()
        services.edits.revert(edit, "somebody")
        assert worker_jobs.claim(edit) is None
        assert worker_jobs.claim("edit_gone") is None

    def test_other_model(
        self, make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job for another model waits for a worker that has it."""
        edit = submit_edit()
        assert make_worker_jobs("worker-2", model="other").claim(edit) is None
        assert services.edits.get(edit)["status"] == "queued"

    def test_orphan(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A job whose worker died is begun again; what the dead one still writes is refused."""
        edit = submit_edit()
        stale_job = worker_jobs.claim(edit)
        expire_heartbeat(worker_jobs)
        successor = make_worker_jobs("worker-2")
        job = successor.claim(edit)
        assert job.attempt == 2
        for write in (
            lambda: worker_jobs.commit_edit(stale_job, 0, b"x", {}, {}),
            lambda: worker_jobs.finish(stale_job, "rejected", {}),
            lambda: worker_jobs.fail(stale_job, "x"),
            lambda: worker_jobs.report_progress(stale_job, Progress("x", 1, 2)),
            lambda: worker_jobs.requeue(stale_job),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert successor.commit_edit(job, 0, b"right", {}, {}) == 1
        with pytest.raises(LeaseLost):
            worker_jobs.commit_edit(stale_job, 1, b"x", {}, {})
        assert successor.head() == 1

    def test_stalled_worker_of_exhausted_job(
        self, make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A worker that was only frozen while its job was given up has not ended it: what it writes is refused."""
        edit = submit_edit()
        for n in range(3):
            worker_jobs = make_worker_jobs(f"doomed-{n}")
            late = worker_jobs.claim(edit)
            expire_heartbeat(worker_jobs)
        make_worker_jobs("worker-2").claim(edit)
        for write in (
            lambda: worker_jobs.commit_edit(late, 0, b"x", {}, {}),
            lambda: worker_jobs.finish(late, "rejected"),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert services.edits.get(edit)["status"] == "failed"

    def test_request_id(self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]) -> None:
        """A job remembers which request asked for it."""
        ids.request_id.set("req-7")
        try:
            assert worker_jobs.claim(submit_edit()).request_id == "req-7"
        finally:
            ids.request_id.set("")
        assert worker_jobs.claim(submit_edit()).request_id == ""

    def test_orphan_of_the_same_name(
        self, make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any]
    ) -> None:
        """A worker that restarts under its old name takes over what its earlier life had begun."""
        edit = submit_edit()
        late = make_worker_jobs("same").claim(edit)
        reborn = make_worker_jobs("same")
        assert reborn.claim(edit).attempt == 2
        with pytest.raises(LeaseLost):
            reborn.finish(late, "rejected")

    def test_attempts(
        self,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
    ) -> None:
        """A job whose workers keep dying fails with the reason, and is announced as ended."""
        edit = submit_edit()
        for n in range(3):
            worker_jobs = make_worker_jobs(f"doomed-{n}")
            assert worker_jobs.claim(edit).attempt == n + 1
            expire_heartbeat(worker_jobs)
        assert make_worker_jobs("worker-2").claim(edit) is None
        found = services.edits.get(edit)
        assert found["status"] == "failed"
        assert "died 3 times" in found["error"]["detail"]
        assert services.jobs.page(exhausted=True)["items"][0]["id"] == edit
        assert last_event(broker, edit).data == found

    def test_orphan_that_was_cancelled(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
        services: Services,
    ) -> None:
        """A cancelled job whose worker died ends as cancelled."""
        edit = submit_edit()
        worker_jobs.claim(edit)
        services.edits.revert(edit, "somebody")
        expire_heartbeat(worker_jobs)
        assert make_worker_jobs("worker-2").claim(edit) is None
        assert services.edits.get(edit)["status"] == "cancelled"

    def test_requeue(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services, broker: Broker
    ) -> None:
        """A job put back by a worker that stops waits again, and the attempt does not count."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker_jobs.requeue(worker_jobs.claim(edit))
        assert services.edits.get(edit)["status"] == "queued"
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]
        assert worker_jobs.claim(edit).attempt == 1


class TestNotifyLostJobs:
    def test_lost_notification(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], broker: Broker
    ) -> None:
        """A job whose bell was lost is announced again."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)  # and the taker forgot it
        assert worker_jobs.notify_lost_jobs() == 1
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]

    def test_dead_worker(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
        broker: Broker,
    ) -> None:
        """A running job is announced again when its worker died, and only then."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker_jobs.claim(edit)
        other = make_worker_jobs("worker-2")
        assert other.notify_lost_jobs() == 0
        expire_heartbeat(worker_jobs)
        assert other.notify_lost_jobs() == 1
        worker_jobs.heartbeat(0)
        assert other.notify_lost_jobs() == 0

    def test_single_process(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A sole worker takes over at once whatever runs under another name: it has no living neighbour."""
        edit = submit_edit()
        worker_jobs.claim(edit)
        assert make_worker_jobs("worker-2").notify_lost_jobs() == 0
        reborn = make_worker_jobs("worker-3", sole=True)
        assert reborn.notify_lost_jobs() == 1
        assert reborn.claim(edit).attempt == 2

    def test_quarantined_worker(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
    ) -> None:
        """What a worker that took itself out had running may be taken over at once."""
        edit = submit_edit()
        worker_jobs.claim(edit)
        worker_jobs.quarantine("tired")
        other = make_worker_jobs("worker-2")
        assert other.notify_lost_jobs() == 1
        assert other.claim(edit).attempt == 2

    def test_nothing_lost(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Where as many deliveries wait as rows no bell was lost, and none is rung: the sweep of a long queue is cheap."""
        for n in range(3):
            submit_edit(f"Tower {n}")
        monkeypatch.setattr(broker, "notify", raise_unavailable)
        assert worker_jobs.notify_lost_jobs() == 0

    def test_bounded(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After the queue has lost everything the oldest jobs are rung for first, not all at once."""
        monkeypatch.setattr(worker_jobs_module, "MAX_LOST_JOBS_NOTIFIED", 2)
        edits = [submit_edit(f"Tower {n}") for n in range(3)]
        broker.receive(["edit"], 9, 0)
        assert worker_jobs.notify_lost_jobs() == 2
        assert [d.job_id for d in broker.receive(["edit"], 9, 0)] == edits[:2]

    def test_few_statements(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
        database: Database,
    ) -> None:
        """A sweep asks the store as often for many jobs as for one."""
        for n in range(20):
            make_worker_jobs(f"worker-{n}").claim(submit_edit(f"Tower {n}"))
        worker_jobs.notify_lost_jobs()
        asked = []
        listen = lambda *args: asked.append(args[2])  # noqa: E731
        event.listen(database.engine, "before_cursor_execute", listen)
        worker_jobs.notify_lost_jobs()
        event.remove(database.engine, "before_cursor_execute", listen)
        assert sum(statement.startswith("SELECT") for statement in asked) == 1

    def test_deregistered_worker(
        self,
        worker_jobs: WorkerJobs,
        make_worker_jobs: Callable[..., WorkerJobs],
        submit_edit: Callable[..., Any],
    ) -> None:
        """What a worker that left had running may be taken over at once."""
        edit = submit_edit()
        worker_jobs.claim(edit)
        worker_jobs.deregister()
        assert make_worker_jobs("worker-2").claim(edit).attempt == 2


class TestCommitEdit:
    def test_commit_edit(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        database: Database,
    ) -> None:
        """An edit lands with its factors, its entry and its row at once, and its end is announced."""
        edit = submit_edit(target_true="Paris")
        assert commit_edit(worker_jobs, edit) == 1
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

    def test_head_moved(self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]) -> None:
        """An edit that was looked at on an older head does not land, and may try again on the new one."""
        first, second = worker_jobs.claim(submit_edit()), worker_jobs.claim(submit_edit("Colosseum"))
        assert worker_jobs.commit_edit(first, 0, b"1", {}, {}) == 1
        with pytest.raises(Conflict, match="head moved"):
            worker_jobs.commit_edit(second, 0, b"2", {}, {})
        assert worker_jobs.head() == 1
        assert worker_jobs.commit_edit(second, 1, b"2", {}, {}) == 2

    def test_race_at_one_head(
        self, make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any]
    ) -> None:
        """Of workers that land on one head at once, one does and every other one has a Conflict."""
        all_worker_jobs = [make_worker_jobs(f"racer-{n}") for n in range(4)]
        jobs = [worker_jobs.claim(submit_edit(f"Tower {n}")) for n, worker_jobs in enumerate(all_worker_jobs)]
        barrier = threading.Barrier(len(all_worker_jobs))

        def race(pair: Any) -> Any:
            worker_jobs, job = pair
            barrier.wait()
            try:
                return worker_jobs.apply(job, 0, job.id.encode(), {}, {})
            except Conflict:
                return "conflict"

        with ThreadPoolExecutor(len(all_worker_jobs)) as pool:
            results = list(pool.map(race, zip(all_worker_jobs, jobs, strict=True)))
        assert sorted(results, key=str) == [1, "conflict", "conflict", "conflict"]

    def test_cancel_first(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A cancel that came before the commit wins: nothing lands."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        services.edits.revert(edit, "somebody")
        with pytest.raises(Cancelled):
            worker_jobs.commit_edit(job, 0, b"x", {}, {})
        assert worker_jobs.head() == 0
        worker_jobs.finish(job, "cancelled")
        assert services.edits.get(edit)["status"] == "cancelled"
        with pytest.raises(Exception, match="only an edit that was applied"):
            services.edits.delta(edit)

    def test_twice(self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]) -> None:
        """An edit lands once: who lands it again is told where it stands."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        assert worker_jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        commit_edit(worker_jobs, submit_edit("Colosseum"))
        assert worker_jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        assert worker_jobs.head() == 2

    def test_non_finite_values(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Infinite and undefined figures in a result or a body become null, in the row and in the hash."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        worker_jobs.commit_edit(job, 0, b"x", {"strength": float("nan")}, {"perplexity": float("inf")})
        assert services.edits.get(edit)["result"] == {"perplexity": None}
        assert services.ledger.verify()["ok"]


class TestUnknownCommitOutcome:
    """The database goes away between a commit and its answer."""

    @pytest.fixture
    def job(self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]) -> Any:
        return worker_jobs.claim(submit_edit())

    @pytest.mark.parametrize(
        ("end", "status", "head"),
        [
            (lambda desk, job: desk.apply(job, 0, b"x", {}, {}), "applied", 1),
            (lambda desk, job: desk.finish(job, "rejected", {}), "rejected", 0),
            (lambda desk, job: desk.fail(job, "x"), "failed", 0),
        ],
    )
    @pytest.mark.parametrize("again", ["same", "release", "fail"])
    def test_end(
        self,
        worker_jobs: WorkerJobs,
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
        lose_connection_after_commit(worker_jobs, monkeypatch)
        with pytest.raises(Unavailable):
            end(worker_jobs, job)
        {"same": end, "release": WorkerJobs.requeue, "fail": lambda d, j: d.fail(j, "y")}[again](
            worker_jobs, job
        )
        found = services.edits.get(job.id)
        assert (found["status"], worker_jobs.head()) == (status, head)
        assert last_event(broker, job.id).data == found
        assert services.ledger.verify()["ok"]

    def test_claim(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A start that was written without the worker knowing is begun again."""
        edit = submit_edit()
        lose_connection_after_commit(worker_jobs, monkeypatch)
        with pytest.raises(Unavailable):
            worker_jobs.claim(edit)
        assert worker_jobs.claim(edit).attempt == 2

    def test_requeue(
        self, worker_jobs: WorkerJobs, job: Any, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A job that was put back stays so: it is no longer this worker's, and the sweep rings."""
        lose_connection_after_commit(worker_jobs, monkeypatch)
        with pytest.raises(Unavailable):
            worker_jobs.requeue(job)
        with pytest.raises(LeaseLost):
            worker_jobs.requeue(job)
        assert services.edits.get(job.id)["status"] == "queued"

    @pytest.mark.parametrize(
        "say", [lambda d: d.attest(0, "x"), lambda d: d.heartbeat(0), lambda d: d.leave()]
    )
    def test_the_worker_itself(
        self, worker_jobs: WorkerJobs, monkeypatch: pytest.MonkeyPatch, say: Any
    ) -> None:
        """What a worker says of itself can be said again."""
        lose_connection_after_commit(worker_jobs, monkeypatch)
        with pytest.raises(Unavailable):
            say(worker_jobs)
        say(worker_jobs)

    def test_outvoted(
        self, make_worker_jobs: Callable[..., WorkerJobs], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker that was outvoted and not told is told when it asks again."""
        make_worker_jobs("worker-1").attest(0, "x")
        loser = make_worker_jobs("worker-2")
        lose_connection_after_commit(loser, monkeypatch)
        with pytest.raises(Unavailable):
            loser.attest(0, "y")
        with pytest.raises(DigestMismatch):
            loser.attest(0, "y")

    def test_broker_outage_after_commit(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What is committed is done, though the queue is down and nobody can be told."""
        first, second, third = (worker_jobs.claim(submit_edit(f"Tower {n}")) for n in range(3))
        for name in ("publish", "announce"):
            monkeypatch.setattr(broker, name, raise_unavailable)
        worker_jobs.commit_edit(first, 0, b"x", {}, {})
        worker_jobs.finish(second, "rejected")
        worker_jobs.requeue(third)
        found = [services.edits.get(job.id)["status"] for job in (first, second, third)]
        assert found == ["applied", "rejected", "queued"]


class TestEnd:
    @pytest.mark.parametrize("status", ["rejected", "cancelled"])
    def test_finish(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        status: str,
    ) -> None:
        """A job that lands nothing ends with its status and figures, and is announced."""
        edit = submit_edit()
        worker_jobs.finish(worker_jobs.claim(edit), status, {"ES": 0.0})
        found = services.edits.get(edit)
        assert (found["status"], found["result"], found["progress"]) == (status, {"ES": 0.0}, None)
        assert last_event(broker, edit).data == found
        assert worker_jobs.head() == 0

    @pytest.mark.parametrize(
        ("error", "status", "told"),
        [
            (InvalidInput("write it so."), "failed", {"title": InvalidInput.title, "detail": "write it so."}),
            ("out of memory", "failed", {"title": "The job failed", "detail": "out of memory"}),
            (Cancelled("stop"), "cancelled", None),
        ],
    )
    def test_fail(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
        error: Any,
        status: str,
        told: Any,
    ) -> None:
        """A job that fails says why; one that was cancelled is called cancelled."""
        edit = submit_edit()
        worker_jobs.fail(worker_jobs.claim(edit), error)
        found = services.edits.get(edit)
        assert (found["status"], found["error"]) == (status, told)

    def test_trace(self, worker_jobs: WorkerJobs, services: Services) -> None:
        """A trace ends as done, with the version at which it ran."""
        asked = TraceRequest(prompt="The Eiffel Tower is located in", subject="Eiffel Tower")
        trace = services.traces.submit(asked, "somebody")["id"]
        worker_jobs.finish(worker_jobs.claim(trace), "done", {"version": 0, "effects": [1.0]})
        found = services.traces.get(trace)
        assert (found["status"], found["version"], found["result"]["effects"]) == ("done", 0, [1.0])
        assert services.ledger.verify()["ok"]


class TestProgress:
    def test_progress(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services, broker: Broker
    ) -> None:
        """Progress is told to listeners at every step, and to the row now and then."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        for n in range(20):
            worker_jobs.report_progress(job, Progress("value", n, 20))
        assert services.edits.get(edit)["progress"] == {"phase": "value", "done": 0, "total": 20}
        worker_jobs.finish(job, "rejected", {})

        async def listen() -> Any:
            return [event.data async for event in broker.events(edit)]

        assert [data["done"] for data in asyncio.run(listen())[:-1]] == list(range(20))

    def test_cancel_while_it_runs(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Somebody's cancel is known to the worker at its next question."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        assert not worker_jobs.cancel_requested(job)
        assert services.edits.revert(edit, "somebody")["status"] == "running"
        assert worker_jobs.cancel_requested(job)

    def test_cancel_from_the_row(self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]) -> None:
        """A cancel whose message was lost is found in the row."""
        edit = submit_edit()
        job = worker_jobs.claim(edit)
        with worker_jobs.database.write_session() as session:
            session.execute(update(Job).where(Job.id == edit).values(cancel_requested=True))
        worker_jobs.report_progress(job, Progress("value", 1, 2))
        assert worker_jobs.cancel_requested(job)


class TestArtifacts:
    @pytest.fixture
    def evaluation(self, services: Services) -> Any:
        return services.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]

    @staticmethod
    def count(database: Database) -> Any:
        with database.read_session() as session:
            return session.scalar(select(func.count()).select_from(JobArtifact))

    def test_artifacts_survive_attempts(
        self, worker_jobs: WorkerJobs, make_worker_jobs: Callable[..., WorkerJobs], evaluation: Any
    ) -> None:
        """What an attempt keeps is there for the next one, the newest of each name; one that was taken over keeps no more."""
        stale_job = worker_jobs.claim(evaluation)
        for data in (b"old", b"new\x00"):
            worker_jobs.put_artifact(stale_job, "a", data)
        expire_heartbeat(worker_jobs)
        successor = make_worker_jobs("worker-2")
        job = successor.claim(evaluation)
        assert (successor.get_artifact(job, "a"), successor.get_artifact(job, "b")) == (b"new\x00", None)
        with pytest.raises(LeaseLost):
            worker_jobs.put_artifact(stale_job, "a", b"late")
        successor.put_artifact(job, "b", b"2")
        assert [successor.get_artifact(job, name) for name in "ab"] == [b"new\x00", b"2"]

    def test_artifacts_belong_to_one_job(
        self, worker_jobs: WorkerJobs, evaluation: Any, services: Services
    ) -> None:
        """A part belongs to one job."""
        job = worker_jobs.claim(evaluation)
        worker_jobs.put_artifact(job, "a", b"x")
        other = services.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]
        assert worker_jobs.get_artifact(worker_jobs.claim(other), "a") is None

    @pytest.mark.parametrize("end", ["done", "cancelled"])
    def test_gone_with_the_job(
        self, worker_jobs: WorkerJobs, evaluation: Any, database: Database, end: Any
    ) -> None:
        """A job that has ended keeps nothing."""
        job = worker_jobs.claim(evaluation)
        worker_jobs.put_artifact(job, "a", b"x")
        assert self.count(database) == 2  # its records, too
        worker_jobs.finish(job, end)
        assert self.count(database) == 0

    def test_cancelled_before_it_began(self, evaluation: Any, database: Database, services: Services) -> None:
        """Nor does one that is cancelled while it waits."""
        services.evaluations.cancel(evaluation)
        assert self.count(database) == 0

    def test_failed(self, worker_jobs: WorkerJobs, evaluation: Any, services: Services) -> None:
        """A job that failed may be tried again, and goes on with what it kept."""
        job = worker_jobs.claim(evaluation)
        worker_jobs.put_artifact(job, "a", b"x")
        worker_jobs.fail(job, "out of memory")
        services.jobs.retry(evaluation, "admin")
        assert worker_jobs.get_artifact(worker_jobs.claim(evaluation), "a") == b"x"

    def test_put_artifact_again(
        self, worker_jobs: WorkerJobs, evaluation: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A part whose keeping is in doubt is kept again without harm."""
        job = worker_jobs.claim(evaluation)
        lose_connection_after_commit(worker_jobs, monkeypatch)
        with pytest.raises(Unavailable):
            worker_jobs.put_artifact(job, "a", b"x")
        worker_jobs.put_artifact(job, "a", b"x")
        assert worker_jobs.get_artifact(job, "a") == b"x"


class TestLedger:
    def test_associations(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A replica is given the factors that are active at a version, each with what its entry says."""
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker_jobs, a, strength=1.5)
        commit_edit(worker_jobs, b)
        services.edits.revert(a, "somebody")
        assert worker_jobs.active_at(0) == []
        assert [x for x, _ in worker_jobs.active_at(2)] == [a, b]
        assert [x for x, _ in worker_jobs.active_at(3)] == [b]
        assert worker_jobs.active_at(1)[0][1]["strength"] == 1.5
        assert worker_jobs.factors_of([b, a]) == {a: a.encode(), b: b.encode()}

    def test_the_ledger_is_read_once(
        self,
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Only entries that are new are read, and what is active is what a desk that knows nothing finds."""
        read = []
        entries = ledger.entries
        monkeypatch.setattr(
            ledger, "entries", lambda *args, **kwargs: read.append(kwargs) or entries(*args, **kwargs)
        )
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker_jobs, a)
        assert [x for x, _ in worker_jobs.active_at(1)] == [a]
        commit_edit(worker_jobs, b)
        services.edits.revert(a, "somebody")
        read.clear()
        assert [x for x, _ in worker_jobs.active_at(3)] == [b]
        assert read == [{"after": 0}]
        assert [x for x, _ in worker_jobs.active_at(2)] == [a, b]
        assert read == [{"after": 0}, {"after": 2}]

    def test_a_restored_ledger_is_read_again(
        self, worker_jobs: WorkerJobs, submit_edit: Callable[..., Any]
    ) -> None:
        """When the last entry that was known is another or gone, because a back-up was put in place, nothing old counts."""
        a = submit_edit()
        commit_edit(worker_jobs, a)
        assert [x for x, _ in worker_jobs.active_at(1)] == [a]
        worker_jobs._cached_entries = [
            replace(worker_jobs._cached_entries[0], hash="0" * 64, edit_id="another")
        ]
        assert [x for x, _ in worker_jobs.active_at(1)] == [a]
        worker_jobs._cached_entries = [
            worker_jobs._cached_entries[0],
            replace(worker_jobs._cached_entries[0], version=2),
        ]
        assert [x for x, _ in worker_jobs.active_at(1)] == [a]
        with pytest.raises(NotFound):
            worker_jobs.active_at(2)

    @pytest.mark.parametrize("version", [-1, 1])
    def test_unknown_version(self, worker_jobs: WorkerJobs, version: int) -> None:
        """There is nothing to stand on beyond the head."""
        with pytest.raises(NotFound, match="no version"):
            worker_jobs.active_at(version)


class TestVote:
    """Whose weights are right when workers differ."""

    def replicas(self, services: Services) -> Any:
        return {
            r["worker"]: (r["digest"], r["withdrawn"] is None) for r in services.ledger.verify()["replicas"]
        }

    def test_attest(self, worker_jobs: WorkerJobs, services: Services) -> None:
        """A worker's digest of a version is listed with where it stands, and saying it again changes nothing."""
        worker_jobs.attest(0, "x")
        first = services.ledger.verify()["replicas"]
        worker_jobs.attest(0, "x")
        assert services.ledger.verify()["replicas"] == first
        (replica,) = first
        assert (replica["worker"], replica["digest"], replica["device"]) == ("worker-1", "x", "cpu")
        assert replica["withdrawn"] is None

    def test_minority(self, make_worker_jobs: Callable[..., WorkerJobs], services: Services) -> None:
        """Who is in the minority is told so, takes its word back, and is listed with the reason."""
        for n in (1, 2):
            make_worker_jobs(f"worker-{n}").attest(0, "right")
        odd = make_worker_jobs("worker-3")
        with pytest.raises(DigestMismatch, match="digest wrong and those of the others right"):
            odd.attest(0, "wrong")
        odd.deregister()
        assert self.replicas(services) == {
            "worker-1": ("right", True), "worker-2": ("right", True), "worker-3": ("wrong", False),
        }  # fmt: skip
        assert services.ledger.verify()["ok"]
        shown = {worker["id"]: worker for worker in services.models.describe()["workers"]}
        assert shown["worker-3"]["state"] == "withdrawn"
        assert "digest wrong" in shown["worker-3"]["reason"]
        assert [shown[f"worker-{n}"]["state"] for n in (1, 2)] == ["serving"] * 2

    def test_first_of_two(self, make_worker_jobs: Callable[..., WorkerJobs]) -> None:
        """Of two that differ the one that spoke first is believed."""
        make_worker_jobs("worker-1").attest(0, "x")
        with pytest.raises(DigestMismatch):
            make_worker_jobs("worker-2").attest(0, "y")

    def test_majority_comes_later(self, make_worker_jobs: Callable[..., WorkerJobs]) -> None:
        """Who spoke first and is outnumbered later learns of it when it speaks again."""
        first, others = make_worker_jobs("worker-1"), [make_worker_jobs(f"worker-{n}") for n in (2, 3)]
        first.attest(0, "wrong")
        with first.database.write_session() as session:
            for other in others:
                attestations.attest(session, MODEL, 0, other.worker, "right", "cpu")
        with pytest.raises(DigestMismatch):
            first.attest(0, "wrong")

    def test_alive_workers_outvote_dead_ones(self, make_worker_jobs: Callable[..., WorkerJobs]) -> None:
        """Who is gone cannot outvote the living; between living ones that differ they decide."""
        for n in range(3):
            gone = make_worker_jobs(f"gone-{n}")
            gone.attest(0, "x")
            gone.deregister()
        make_worker_jobs("worker-1").attest(0, "y")
        make_worker_jobs("worker-2").attest(0, "x")
        with pytest.raises(DigestMismatch):
            make_worker_jobs("worker-1").attest(0, "y")

    def test_one_state_one_vote(
        self,
        make_worker_jobs: Callable[..., WorkerJobs],
        worker_jobs: WorkerJobs,
        submit_edit: Callable[..., Any],
        services: Services,
    ) -> None:
        """Versions of one state are one vote: after a revert the base's digest must come back."""
        worker_jobs.attest(0, "base")
        edit = submit_edit()
        commit_edit(worker_jobs, edit)
        services.edits.revert(edit, "somebody")
        worker_jobs.attest(1, "edited")
        worker_jobs.attest(2, "base")
        with pytest.raises(DigestMismatch):
            make_worker_jobs("worker-2").attest(2, "other")
        make_worker_jobs("worker-3").attest(1, "edited")

    def test_other_device(
        self, make_worker_jobs: Callable[..., WorkerJobs], database: Database, broker: Broker
    ) -> None:
        """Devices of another kind have bytes, and a vote, of their own."""
        make_worker_jobs("worker-1").attest(0, "x")
        other = WorkerJobs(database, broker, MODEL, "worker-2")
        other.register({**INFO, "device": "cuda"}, tokenizer_json())
        other.attest(0, "y")

    def test_concurrent_attestations(self, make_worker_jobs: Callable[..., WorkerJobs]) -> None:
        """Of two that differ and speak at once one is believed and one is not."""
        racers, barrier = [make_worker_jobs(f"racer-{n}") for n in range(4)], threading.Barrier(4)

        def speak(worker_jobs: WorkerJobs) -> Any:
            barrier.wait()
            try:
                worker_jobs.attest(0, worker_jobs.worker)
                return True
            except DigestMismatch:
                return False

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(speak, racers)) == 1


class TestWorkers:
    def test_pruned_while_alive(self, worker_jobs: WorkerJobs, broker: Broker, database: Database) -> None:
        """A worker that was thought dead and struck out is listed again with its next heartbeat, as it registered."""
        worker_jobs_module.delete_all_workers(database)
        worker_jobs.heartbeat(3, "x")
        found = worker_row(worker_jobs)
        assert (found.version, found.digest, found.model) == (3, "x", MODEL)

    def test_heartbeat_after_deregister(self, worker_jobs: WorkerJobs) -> None:
        """A late heartbeat does not bring back a worker that has left."""
        worker_jobs.deregister()
        worker_jobs.heartbeat(3, "x")
        assert worker_row(worker_jobs) is None

    def test_quarantined_stays_listed(self, worker_jobs: WorkerJobs) -> None:
        """A worker that took itself out stays listed when it leaves, and is no longer after a day."""
        worker_jobs.quarantine("tired")
        worker_jobs.heartbeat(1, "x")
        worker_jobs.deregister()
        assert worker_row(worker_jobs).reason == "tired"

    def test_prune(self, worker_jobs: WorkerJobs, make_worker_jobs: Callable[..., WorkerJobs]) -> None:
        """Workers silent for a day are struck out by the sweep; those silent for an hour are not."""
        for name, hours in (("long-gone", 25), ("gone", 1)):
            make_worker_jobs(name)
            with worker_jobs.database.write_session() as session:
                then = now() - timedelta(hours=hours)
                session.execute(update(Worker).where(Worker.id == name).values(heartbeat=then))
        worker_jobs.notify_lost_jobs()
        assert (worker_row(worker_jobs, "long-gone"), worker_row(worker_jobs, "gone") is not None) == (
            None,
            True,
        )

    def test_foreign_workers(
        self, worker_jobs: WorkerJobs, make_worker_jobs: Callable[..., WorkerJobs]
    ) -> None:
        """A worker can ask who else lives with another model; the dead and its own kind are none."""
        make_worker_jobs("kin")
        assert worker_jobs.foreign_workers() == []
        other = make_worker_jobs("other-1", model="other")
        (told,) = worker_jobs.foreign_workers()
        assert "other-1" in told
        expire_heartbeat(other)
        assert worker_jobs.foreign_workers() == []


def test_workers_register_at_once(make_worker_jobs: Callable[..., WorkerJobs], database: Database) -> None:
    """Workers that bring up one model at once all register."""
    all_worker_jobs = [WorkerJobs(database, MemoryBroker(), "new", f"w{n}") for n in range(6)]
    barrier = threading.Barrier(len(all_worker_jobs))

    def register(worker_jobs: WorkerJobs) -> None:
        barrier.wait()
        worker_jobs.register(INFO, tokenizer_json())

    with ThreadPoolExecutor(len(all_worker_jobs)) as pool:
        list(pool.map(register, all_worker_jobs))
    with database.read_session() as session:
        assert session.query(Worker).count() == 6


def test_claim_refreshes_heartbeat(
    make_worker_jobs: Callable[..., WorkerJobs], submit_edit: Callable[..., Any]
) -> None:
    """A worker that slept beyond its lease and begins a job is no dead one, whatever its last heartbeat says."""
    first, second = make_worker_jobs("worker-1"), make_worker_jobs("worker-2")
    expire_heartbeat(first)
    edit = submit_edit()
    assert first.claim(edit) is not None
    assert second.claim(edit) is None
