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

from service.application import Operations
from service.bootstrap import Wired
from service.db.database import Database
from service.db.models import Job, Part, Worker, now
from service.errors import Cancelled, Conflict, Disagrees, InvalidInput, LeaseLost, NotFound, Unavailable
from service.jobs import attestations
from service.jobs import job_store as desks
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
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
def database(wired: Wired) -> Any:
    return wired.database


@pytest.fixture
def broker(wired: Wired) -> Any:
    return wired.broker


@pytest.fixture
def make_desk(database: Database, broker: Broker) -> Any:
    def make(worker: Any = "worker-1", model: Any = MODEL, **options: Any) -> Any:
        desk = Desk(database, broker, model, worker, 3, **options)
        desk.register(INFO, tokenizer_json())
        return desk

    return make


@pytest.fixture
def desk(make_desk: Callable[..., Desk]) -> Any:
    return make_desk()


@pytest.fixture
def operations(database: Database, broker: Broker, desk: Desk, tmp_path: Path) -> Any:
    return Operations(database, broker, Settings(data=tmp_path))


@pytest.fixture
def ask(operations: Operations) -> Any:
    """Queue an edit and return its id."""

    def ask(subject: str = "Eiffel Tower", target: Any = "Rome", **more: Any) -> Any:
        request = EditRequest(subject=subject, prompt="The {} is located in", target_new=target, **more)
        return operations.edits.submit([request], "somebody")[0]["id"]

    return ask


def land(desk: Desk, edit_id: str, **body: Any) -> Any:
    job = desk.start(edit_id)
    return desk.apply(job, desk.head(), edit_id.encode(), {"seed": 1, **body}, {"seconds": 1.0})


def die(desk: Desk) -> None:
    """The worker is heard of no more."""
    with desk.database.session() as session:
        long_ago = now() - timedelta(hours=1)
        session.execute(update(Worker).where(Worker.id == desk.worker).values(heartbeat=long_ago))


def row(desk: Desk, worker: Any = "worker-1") -> Any:
    with desk.database.read() as session:
        return session.get(Worker, worker)


def cut_after_commit(desk: Desk, monkeypatch: pytest.MonkeyPatch, times: Any = 1) -> None:
    """The desk's next commits succeed, and their answers are lost."""
    session, left = desk.database.session, [times]

    @contextmanager
    def doubtful() -> Iterator[Any]:
        with session() as opened:
            yield opened
        left[0] -= 1
        if left[0] >= 0:
            raise Unavailable("nobody knows.", outcome="unknown")

    monkeypatch.setattr(desk.database, "session", doubtful)


def down(*_: Any, **__: Any) -> None:
    raise Unavailable("the queue does not answer.")


def last_event(broker: Broker, job_id: str) -> Any:
    async def listen() -> Any:
        async with asyncio.timeout(20):
            return [event async for event in broker.events(job_id)][-1]

    return asyncio.run(listen())


class TestStart:
    def test_start(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """A job that waits is begun, and its row says so."""
        edit = ask()
        job = desk.start(edit)
        assert (job.id, job.kind, job.attempt, job.request["target_new"]) == (edit, "edit", 1, "Rome")
        found = operations.edits.get(edit)
        assert (found["status"], found["attempts"]) == ("running", 1)
        assert found["started"] is not None

    def test_only_once(self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """A job that runs is begun by nobody else, nor twice by one worker."""
        edit = ask()
        assert desk.start(edit)
        assert desk.start(edit) is None
        assert make_desk("worker-2").start(edit) is None

    def test_race(self, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """Of many workers that begin one job at once, one does."""
        edit = ask()
        desks = [make_desk(f"racer-{n}") for n in range(6)]
        barrier = threading.Barrier(len(desks))

        def start(desk: Desk) -> Any:
            barrier.wait()
            return desk.start(edit)

        with ThreadPoolExecutor(len(desks)) as pool:
            started = [job for job in pool.map(start, desks) if job]
        assert len(started) == 1

    def test_nothing_to_do(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """A job that is gone, ended or cancelled is not begun."""
        edit = ask()
        operations.edits.revert(edit, "somebody")
        assert desk.start(edit) is None
        assert desk.start("edit_gone") is None

    def test_other_model(
        self, make_desk: Callable[..., Desk], ask: Callable[..., Any], operations: Operations
    ) -> None:
        """A job for another model waits for a worker that has it."""
        edit = ask()
        assert make_desk("worker-2", model="other").start(edit) is None
        assert operations.edits.get(edit)["status"] == "queued"

    def test_orphan(self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """A job whose worker died is begun again; what the dead one still writes is refused."""
        edit = ask()
        late = desk.start(edit)
        die(desk)
        heir = make_desk("worker-2")
        job = heir.start(edit)
        assert job.attempt == 2
        for write in (
            lambda: desk.apply(late, 0, b"x", {}, {}),
            lambda: desk.finish(late, "rejected", {}),
            lambda: desk.fail(late, "x"),
            lambda: desk.progress(late, Progress("x", 1, 2)),
            lambda: desk.release(late),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert heir.apply(job, 0, b"right", {}, {}) == 1
        with pytest.raises(LeaseLost):
            desk.apply(late, 1, b"x", {}, {})
        assert heir.head() == 1

    def test_frozen_and_given_up(
        self, make_desk: Callable[..., Desk], ask: Callable[..., Any], operations: Operations
    ) -> None:
        """A worker that was only frozen while its job was given up has not ended it: what it writes is refused."""
        edit = ask()
        for n in range(3):
            desk = make_desk(f"doomed-{n}")
            late = desk.start(edit)
            die(desk)
        make_desk("worker-2").start(edit)
        for write in (lambda: desk.apply(late, 0, b"x", {}, {}), lambda: desk.finish(late, "rejected")):
            with pytest.raises(LeaseLost):
                write()
        assert operations.edits.get(edit)["status"] == "failed"

    def test_request_id(self, desk: Desk, ask: Callable[..., Any]) -> None:
        """A job remembers which request asked for it."""
        ids.request_id.set("req-7")
        try:
            assert desk.start(ask()).request_id == "req-7"
        finally:
            ids.request_id.set("")
        assert desk.start(ask()).request_id == ""

    def test_orphan_of_the_same_name(self, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """A worker that restarts under its old name takes over what its earlier life had begun."""
        edit = ask()
        late = make_desk("same").start(edit)
        reborn = make_desk("same")
        assert reborn.start(edit).attempt == 2
        with pytest.raises(LeaseLost):
            reborn.finish(late, "rejected")

    def test_attempts(
        self, make_desk: Callable[..., Desk], ask: Callable[..., Any], operations: Operations, broker: Broker
    ) -> None:
        """A job whose workers keep dying fails with the reason, and is announced as ended."""
        edit = ask()
        for n in range(3):
            desk = make_desk(f"doomed-{n}")
            assert desk.start(edit).attempt == n + 1
            die(desk)
        assert make_desk("worker-2").start(edit) is None
        found = operations.edits.get(edit)
        assert found["status"] == "failed"
        assert "died 3 times" in found["error"]["detail"]
        assert operations.jobs.page(dead=True)["items"][0]["id"] == edit
        assert last_event(broker, edit).data == found

    def test_orphan_that_was_cancelled(
        self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any], operations: Operations
    ) -> None:
        """A cancelled job whose worker died ends as cancelled."""
        edit = ask()
        desk.start(edit)
        operations.edits.revert(edit, "somebody")
        die(desk)
        assert make_desk("worker-2").start(edit) is None
        assert operations.edits.get(edit)["status"] == "cancelled"

    def test_release(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, broker: Broker
    ) -> None:
        """A job put back by a worker that stops waits again, and the attempt does not count."""
        edit = ask()
        broker.take(["edit"], 1, 0)
        desk.release(desk.start(edit))
        assert operations.edits.get(edit)["status"] == "queued"
        assert [d.job_id for d in broker.take(["edit"], 1, 0)] == [edit]
        assert desk.start(edit).attempt == 1


class TestSweep:
    def test_lost_bell(self, desk: Desk, ask: Callable[..., Any], broker: Broker) -> None:
        """A job whose bell was lost is announced again."""
        edit = ask()
        broker.take(["edit"], 1, 0)  # and the taker forgot it
        assert desk.sweep() == 1
        assert [d.job_id for d in broker.take(["edit"], 1, 0)] == [edit]

    def test_dead_worker(
        self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any], broker: Broker
    ) -> None:
        """A running job is announced again when its worker died, and only then."""
        edit = ask()
        broker.take(["edit"], 1, 0)
        desk.start(edit)
        other = make_desk("worker-2")
        assert other.sweep() == 0
        die(desk)
        assert other.sweep() == 1
        desk.heartbeat(0)
        assert other.sweep() == 0

    def test_sole_worker(self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """A sole worker takes over at once whatever runs under another name: it has no living neighbour."""
        edit = ask()
        desk.start(edit)
        assert make_desk("worker-2").sweep() == 0
        reborn = make_desk("worker-3", sole=True)
        assert reborn.sweep() == 1
        assert reborn.start(edit).attempt == 2

    def test_worker_that_withdrew(
        self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any]
    ) -> None:
        """What a worker that took itself out had running may be taken over at once."""
        edit = ask()
        desk.start(edit)
        desk.withdraw("tired")
        other = make_desk("worker-2")
        assert other.sweep() == 1
        assert other.start(edit).attempt == 2

    def test_nothing_lost(
        self, desk: Desk, ask: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where as many deliveries wait as rows no bell was lost, and none is rung: the sweep of a long queue is cheap."""
        for n in range(3):
            ask(f"Tower {n}")
        monkeypatch.setattr(broker, "announce", down)
        assert desk.sweep() == 0

    def test_bounded(
        self, desk: Desk, ask: Callable[..., Any], broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the queue has lost everything the oldest jobs are rung for first, not all at once."""
        monkeypatch.setattr(desks, "SWEEP_LIMIT", 2)
        edits = [ask(f"Tower {n}") for n in range(3)]
        broker.take(["edit"], 9, 0)
        assert desk.sweep() == 2
        assert [d.job_id for d in broker.take(["edit"], 9, 0)] == edits[:2]

    def test_few_statements(
        self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any], database: Database
    ) -> None:
        """A sweep asks the store as often for many jobs as for one."""
        for n in range(20):
            make_desk(f"worker-{n}").start(ask(f"Tower {n}"))
        desk.sweep()
        asked = []
        listen = lambda *args: asked.append(args[2])  # noqa: E731
        event.listen(database.engine, "before_cursor_execute", listen)
        desk.sweep()
        event.remove(database.engine, "before_cursor_execute", listen)
        assert sum(statement.startswith("SELECT") for statement in asked) == 1

    def test_worker_that_left(
        self, desk: Desk, make_desk: Callable[..., Desk], ask: Callable[..., Any]
    ) -> None:
        """What a worker that left had running may be taken over at once."""
        edit = ask()
        desk.start(edit)
        desk.leave()
        assert make_desk("worker-2").start(edit).attempt == 2


class TestApply:
    def test_apply(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, broker: Broker, database: Database
    ) -> None:
        """An edit lands with its factors, its entry and its row at once, and its end is announced."""
        edit = ask(target_true="Paris")
        assert land(desk, edit) == 1
        found = operations.edits.get(edit)
        assert (found["status"], found["version"], found["result"]) == ("applied", 1, {"seconds": 1.0})
        assert found["ended"] is not None
        assert operations.edits.delta(edit) == edit.encode()
        event = last_event(broker, edit)
        assert (event.name, event.data) == ("end", found)
        with database.read() as session:
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

    def test_head_moved(self, desk: Desk, ask: Callable[..., Any]) -> None:
        """An edit that was looked at on an older head does not land, and may try again on the new one."""
        first, second = desk.start(ask()), desk.start(ask("Colosseum"))
        assert desk.apply(first, 0, b"1", {}, {}) == 1
        with pytest.raises(Conflict, match="head moved"):
            desk.apply(second, 0, b"2", {}, {})
        assert desk.head() == 1
        assert desk.apply(second, 1, b"2", {}, {}) == 2

    def test_race_at_one_head(self, make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
        """Of workers that land on one head at once, one does and every other one has a Conflict."""
        desks = [make_desk(f"racer-{n}") for n in range(4)]
        jobs = [desk.start(ask(f"Tower {n}")) for n, desk in enumerate(desks)]
        barrier = threading.Barrier(len(desks))

        def race(pair: Any) -> Any:
            desk, job = pair
            barrier.wait()
            try:
                return desk.apply(job, 0, job.id.encode(), {}, {})
            except Conflict:
                return "conflict"

        with ThreadPoolExecutor(len(desks)) as pool:
            results = list(pool.map(race, zip(desks, jobs, strict=True)))
        assert sorted(results, key=str) == [1, "conflict", "conflict", "conflict"]

    def test_cancel_first(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """A cancel that came before the commit wins: nothing lands."""
        edit = ask()
        job = desk.start(edit)
        operations.edits.revert(edit, "somebody")
        with pytest.raises(Cancelled):
            desk.apply(job, 0, b"x", {}, {})
        assert desk.head() == 0
        desk.finish(job, "cancelled")
        assert operations.edits.get(edit)["status"] == "cancelled"
        with pytest.raises(Exception, match="only an edit that was applied"):
            operations.edits.delta(edit)

    def test_twice(self, desk: Desk, ask: Callable[..., Any]) -> None:
        """An edit lands once: who lands it again is told where it stands."""
        edit = ask()
        job = desk.start(edit)
        assert desk.apply(job, 0, b"x", {}, {}) == 1
        land(desk, ask("Colosseum"))
        assert desk.apply(job, 0, b"x", {}, {}) == 1
        assert desk.head() == 2

    def test_figures_that_blew_up(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """Infinite and undefined figures in a result or a body become null, in the row and in the hash."""
        edit = ask()
        job = desk.start(edit)
        desk.apply(job, 0, b"x", {"strength": float("nan")}, {"perplexity": float("inf")})
        assert operations.edits.get(edit)["result"] == {"perplexity": None}
        assert operations.ledger.verify()["ok"]


class TestDoubt:
    """The database goes away between a commit and its answer."""

    @pytest.fixture
    def job(self, desk: Desk, ask: Callable[..., Any]) -> Any:
        return desk.start(ask())

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
        desk: Desk,
        job: Any,
        broker: Broker,
        operations: Operations,
        monkeypatch: pytest.MonkeyPatch,
        end: Any,
        status: str,
        head: Any,
        again: Any,
    ) -> None:
        """An end that was written stands, whatever the worker does next, and is announced then."""
        cut_after_commit(desk, monkeypatch)
        with pytest.raises(Unavailable):
            end(desk, job)
        {"same": end, "release": Desk.release, "fail": lambda d, j: d.fail(j, "y")}[again](desk, job)
        found = operations.edits.get(job.id)
        assert (found["status"], desk.head()) == (status, head)
        assert last_event(broker, job.id).data == found
        assert operations.ledger.verify()["ok"]

    def test_start(self, desk: Desk, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """A start that was written without the worker knowing is begun again."""
        edit = ask()
        cut_after_commit(desk, monkeypatch)
        with pytest.raises(Unavailable):
            desk.start(edit)
        assert desk.start(edit).attempt == 2

    def test_release(
        self, desk: Desk, job: Any, operations: Operations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A job that was put back stays so: it is no longer this worker's, and the sweep rings."""
        cut_after_commit(desk, monkeypatch)
        with pytest.raises(Unavailable):
            desk.release(job)
        with pytest.raises(LeaseLost):
            desk.release(job)
        assert operations.edits.get(job.id)["status"] == "queued"

    @pytest.mark.parametrize(
        "say", [lambda d: d.attest(0, "x"), lambda d: d.heartbeat(0), lambda d: d.leave()]
    )
    def test_the_worker_itself(self, desk: Desk, monkeypatch: pytest.MonkeyPatch, say: Any) -> None:
        """What a worker says of itself can be said again."""
        cut_after_commit(desk, monkeypatch)
        with pytest.raises(Unavailable):
            say(desk)
        say(desk)

    def test_outvoted(self, make_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker that was outvoted and not told is told when it asks again."""
        make_desk("worker-1").attest(0, "x")
        loser = make_desk("worker-2")
        cut_after_commit(loser, monkeypatch)
        with pytest.raises(Unavailable):
            loser.attest(0, "y")
        with pytest.raises(Disagrees):
            loser.attest(0, "y")

    def test_news_are_no_reason_to_fail(
        self,
        desk: Desk,
        ask: Callable[..., Any],
        operations: Operations,
        broker: Broker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What is committed is done, though the queue is down and nobody can be told."""
        first, second, third = (desk.start(ask(f"Tower {n}")) for n in range(3))
        for name in ("publish", "announce"):
            monkeypatch.setattr(broker, name, down)
        desk.apply(first, 0, b"x", {}, {})
        desk.finish(second, "rejected")
        desk.release(third)
        found = [operations.edits.get(job.id)["status"] for job in (first, second, third)]
        assert found == ["applied", "rejected", "queued"]


class TestEnd:
    @pytest.mark.parametrize("status", ["rejected", "cancelled"])
    def test_finish(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, broker: Broker, status: str
    ) -> None:
        """A job that lands nothing ends with its status and figures, and is announced."""
        edit = ask()
        desk.finish(desk.start(edit), status, {"ES": 0.0})
        found = operations.edits.get(edit)
        assert (found["status"], found["result"], found["progress"]) == (status, {"ES": 0.0}, None)
        assert last_event(broker, edit).data == found
        assert desk.head() == 0

    @pytest.mark.parametrize(
        ("error", "status", "told"),
        [
            (InvalidInput("write it so."), "failed", {"title": InvalidInput.title, "detail": "write it so."}),
            ("out of memory", "failed", {"title": "The job failed", "detail": "out of memory"}),
            (Cancelled("stop"), "cancelled", None),
        ],
    )
    def test_fail(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, error: Any, status: str, told: Any
    ) -> None:
        """A job that fails says why; one that was cancelled is called cancelled."""
        edit = ask()
        desk.fail(desk.start(edit), error)
        found = operations.edits.get(edit)
        assert (found["status"], found["error"]) == (status, told)

    def test_trace(self, desk: Desk, operations: Operations) -> None:
        """A trace ends as done, with the version at which it ran."""
        asked = TraceRequest(prompt="The Eiffel Tower is located in", subject="Eiffel Tower")
        trace = operations.traces.submit(asked, "somebody")["id"]
        desk.finish(desk.start(trace), "done", {"version": 0, "effects": [1.0]})
        found = operations.traces.get(trace)
        assert (found["status"], found["version"], found["result"]["effects"]) == ("done", 0, [1.0])
        assert operations.ledger.verify()["ok"]


class TestProgress:
    def test_progress(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, broker: Broker
    ) -> None:
        """Progress is told to listeners at every step, and to the row now and then."""
        edit = ask()
        job = desk.start(edit)
        for n in range(20):
            desk.progress(job, Progress("value", n, 20))
        assert operations.edits.get(edit)["progress"] == {"phase": "value", "done": 0, "total": 20}
        desk.finish(job, "rejected", {})

        async def listen() -> Any:
            return [event.data async for event in broker.events(edit)]

        assert [data["done"] for data in asyncio.run(listen())[:-1]] == list(range(20))

    def test_cancel_while_it_runs(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """Somebody's cancel is known to the worker at its next question."""
        edit = ask()
        job = desk.start(edit)
        assert not desk.cancel_requested(job)
        assert operations.edits.revert(edit, "somebody")["status"] == "running"
        assert desk.cancel_requested(job)

    def test_cancel_from_the_row(self, desk: Desk, ask: Callable[..., Any]) -> None:
        """A cancel whose message was lost is found in the row."""
        edit = ask()
        job = desk.start(edit)
        with desk.database.session() as session:
            session.execute(update(Job).where(Job.id == edit).values(cancel_requested=True))
        desk.progress(job, Progress("value", 1, 2))
        assert desk.cancel_requested(job)


class TestParts:
    @pytest.fixture
    def evaluation(self, operations: Operations) -> Any:
        return operations.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]

    @staticmethod
    def count(database: Database) -> Any:
        with database.read() as session:
            return session.scalar(select(func.count()).select_from(Part))

    def test_kept(self, desk: Desk, make_desk: Callable[..., Desk], evaluation: Any) -> None:
        """What an attempt keeps is there for the next one, the newest of each name; one that was taken over keeps no more."""
        late = desk.start(evaluation)
        for data in (b"old", b"new\x00"):
            desk.keep(late, "a", data)
        die(desk)
        heir = make_desk("worker-2")
        job = heir.start(evaluation)
        assert (heir.kept(job, "a"), heir.kept(job, "b")) == (b"new\x00", None)
        with pytest.raises(LeaseLost):
            desk.keep(late, "a", b"late")
        heir.keep(job, "b", b"2")
        assert [heir.kept(job, name) for name in "ab"] == [b"new\x00", b"2"]

    def test_each_for_itself(self, desk: Desk, evaluation: Any, operations: Operations) -> None:
        """A part belongs to one job."""
        job = desk.start(evaluation)
        desk.keep(job, "a", b"x")
        other = operations.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]
        assert desk.kept(desk.start(other), "a") is None

    @pytest.mark.parametrize("end", ["done", "cancelled"])
    def test_gone_with_the_job(self, desk: Desk, evaluation: Any, database: Database, end: Any) -> None:
        """A job that has ended keeps nothing."""
        job = desk.start(evaluation)
        desk.keep(job, "a", b"x")
        assert self.count(database) == 2  # its records, too
        desk.finish(job, end)
        assert self.count(database) == 0

    def test_cancelled_before_it_began(
        self, evaluation: Any, database: Database, operations: Operations
    ) -> None:
        """Nor does one that is cancelled while it waits."""
        operations.evaluations.cancel(evaluation)
        assert self.count(database) == 0

    def test_failed(self, desk: Desk, evaluation: Any, operations: Operations) -> None:
        """A job that failed may be tried again, and goes on with what it kept."""
        job = desk.start(evaluation)
        desk.keep(job, "a", b"x")
        desk.fail(job, "out of memory")
        operations.jobs.retry(evaluation, "admin")
        assert desk.kept(desk.start(evaluation), "a") == b"x"

    def test_said_again(self, desk: Desk, evaluation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A part whose keeping is in doubt is kept again without harm."""
        job = desk.start(evaluation)
        cut_after_commit(desk, monkeypatch)
        with pytest.raises(Unavailable):
            desk.keep(job, "a", b"x")
        desk.keep(job, "a", b"x")
        assert desk.kept(job, "a") == b"x"


class TestLedger:
    def test_associations(self, desk: Desk, ask: Callable[..., Any], operations: Operations) -> None:
        """A replica is given the factors that are active at a version, each with what its entry says."""
        a, b = ask(), ask("Colosseum")
        land(desk, a, strength=1.5)
        land(desk, b)
        operations.edits.revert(a, "somebody")
        assert desk.active_at(0) == []
        assert [x for x, _ in desk.active_at(2)] == [a, b]
        assert [x for x, _ in desk.active_at(3)] == [b]
        assert desk.active_at(1)[0][1]["strength"] == 1.5
        assert desk.factors_of([b, a]) == {a: a.encode(), b: b.encode()}

    def test_the_ledger_is_read_once(
        self, desk: Desk, ask: Callable[..., Any], operations: Operations, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only entries that are new are read, and what is active is what a desk that knows nothing finds."""
        read = []
        entries = ledger.entries
        monkeypatch.setattr(
            ledger, "entries", lambda *args, **kwargs: read.append(kwargs) or entries(*args, **kwargs)
        )
        a, b = ask(), ask("Colosseum")
        land(desk, a)
        assert [x for x, _ in desk.active_at(1)] == [a]
        land(desk, b)
        operations.edits.revert(a, "somebody")
        read.clear()
        assert [x for x, _ in desk.active_at(3)] == [b]
        assert read == [{"after": 0}]
        assert [x for x, _ in desk.active_at(2)] == [a, b]
        assert read == [{"after": 0}, {"after": 2}]

    def test_a_ledger_that_was_put_back_is_read_anew(self, desk: Desk, ask: Callable[..., Any]) -> None:
        """When the last entry that was known is another or gone, because a back-up was put in place, nothing old counts."""
        a = ask()
        land(desk, a)
        assert [x for x, _ in desk.active_at(1)] == [a]
        desk._past = [replace(desk._past[0], hash="0" * 64, edit_id="another")]
        assert [x for x, _ in desk.active_at(1)] == [a]
        desk._past = [desk._past[0], replace(desk._past[0], version=2)]
        assert [x for x, _ in desk.active_at(1)] == [a]
        with pytest.raises(NotFound):
            desk.active_at(2)

    @pytest.mark.parametrize("version", [-1, 1])
    def test_unknown_version(self, desk: Desk, version: int) -> None:
        """There is nothing to stand on beyond the head."""
        with pytest.raises(NotFound, match="no version"):
            desk.active_at(version)


class TestVote:
    """Whose weights are right when workers differ."""

    def replicas(self, operations: Operations) -> Any:
        return {
            r["worker"]: (r["digest"], r["withdrawn"] is None) for r in operations.ledger.verify()["replicas"]
        }

    def test_attest(self, desk: Desk, operations: Operations) -> None:
        """A worker's digest of a version is listed with where it stands, and saying it again changes nothing."""
        desk.attest(0, "x")
        first = operations.ledger.verify()["replicas"]
        desk.attest(0, "x")
        assert operations.ledger.verify()["replicas"] == first
        (replica,) = first
        assert (replica["worker"], replica["digest"], replica["device"]) == ("worker-1", "x", "cpu")
        assert replica["withdrawn"] is None

    def test_minority(self, make_desk: Callable[..., Desk], operations: Operations) -> None:
        """Who is in the minority is told so, takes its word back, and is listed with the reason."""
        for n in (1, 2):
            make_desk(f"worker-{n}").attest(0, "right")
        odd = make_desk("worker-3")
        with pytest.raises(Disagrees, match="digest wrong and those of the others right"):
            odd.attest(0, "wrong")
        odd.leave()
        assert self.replicas(operations) == {
            "worker-1": ("right", True), "worker-2": ("right", True), "worker-3": ("wrong", False),
        }  # fmt: skip
        assert operations.ledger.verify()["ok"]
        shown = {worker["id"]: worker for worker in operations.models.resident()["workers"]}
        assert shown["worker-3"]["state"] == "withdrawn"
        assert "digest wrong" in shown["worker-3"]["reason"]
        assert [shown[f"worker-{n}"]["state"] for n in (1, 2)] == ["serving"] * 2

    def test_first_of_two(self, make_desk: Callable[..., Desk]) -> None:
        """Of two that differ the one that spoke first is believed."""
        make_desk("worker-1").attest(0, "x")
        with pytest.raises(Disagrees):
            make_desk("worker-2").attest(0, "y")

    def test_majority_comes_later(self, make_desk: Callable[..., Desk]) -> None:
        """Who spoke first and is outnumbered later learns of it when it speaks again."""
        first, others = make_desk("worker-1"), [make_desk(f"worker-{n}") for n in (2, 3)]
        first.attest(0, "wrong")
        with first.database.session() as session:
            for other in others:
                attestations.attest(session, MODEL, 0, other.worker, "right", "cpu")
        with pytest.raises(Disagrees):
            first.attest(0, "wrong")

    def test_the_living_come_first(self, make_desk: Callable[..., Desk]) -> None:
        """Who is gone cannot outvote the living; between living ones that differ they decide."""
        for n in range(3):
            gone = make_desk(f"gone-{n}")
            gone.attest(0, "x")
            gone.leave()
        make_desk("worker-1").attest(0, "y")
        make_desk("worker-2").attest(0, "x")
        with pytest.raises(Disagrees):
            make_desk("worker-1").attest(0, "y")

    def test_one_state_one_vote(
        self, make_desk: Callable[..., Desk], desk: Desk, ask: Callable[..., Any], operations: Operations
    ) -> None:
        """Versions of one state are one vote: after a revert the base's digest must come back."""
        desk.attest(0, "base")
        edit = ask()
        land(desk, edit)
        operations.edits.revert(edit, "somebody")
        desk.attest(1, "edited")
        desk.attest(2, "base")
        with pytest.raises(Disagrees):
            make_desk("worker-2").attest(2, "other")
        make_desk("worker-3").attest(1, "edited")

    def test_other_device(self, make_desk: Callable[..., Desk], database: Database, broker: Broker) -> None:
        """Devices of another kind have bytes, and a vote, of their own."""
        make_desk("worker-1").attest(0, "x")
        other = Desk(database, broker, MODEL, "worker-2")
        other.register({**INFO, "device": "cuda"}, tokenizer_json())
        other.attest(0, "y")

    def test_at_once(self, make_desk: Callable[..., Desk]) -> None:
        """Of two that differ and speak at once one is believed and one is not."""
        racers, barrier = [make_desk(f"racer-{n}") for n in range(4)], threading.Barrier(4)

        def speak(desk: Desk) -> Any:
            barrier.wait()
            try:
                desk.attest(0, desk.worker)
                return True
            except Disagrees:
                return False

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(speak, racers)) == 1


class TestWorkers:
    def test_pruned_while_it_lived(self, desk: Desk, broker: Broker, database: Database) -> None:
        """A worker that was thought dead and struck out is listed again with its next heartbeat, as it registered."""
        desks.forget_workers(database)
        desk.heartbeat(3, "x")
        found = row(desk)
        assert (found.version, found.digest, found.model) == (3, "x", MODEL)

    def test_gone_is_gone(self, desk: Desk) -> None:
        """A late heartbeat does not bring back a worker that has left."""
        desk.leave()
        desk.heartbeat(3, "x")
        assert row(desk) is None

    def test_withdrawn_stays_listed(self, desk: Desk) -> None:
        """A worker that took itself out stays listed when it leaves, and is no longer after a day."""
        desk.withdraw("tired")
        desk.heartbeat(1, "x")
        desk.leave()
        assert row(desk).reason == "tired"

    def test_prune(self, desk: Desk, make_desk: Callable[..., Desk]) -> None:
        """Workers silent for a day are struck out by the sweep; those silent for an hour are not."""
        for name, hours in (("long-gone", 25), ("gone", 1)):
            make_desk(name)
            with desk.database.session() as session:
                then = now() - timedelta(hours=hours)
                session.execute(update(Worker).where(Worker.id == name).values(heartbeat=then))
        desk.sweep()
        assert (row(desk, "long-gone"), row(desk, "gone") is not None) == (None, True)

    def test_strangers(self, desk: Desk, make_desk: Callable[..., Desk]) -> None:
        """A worker can ask who else lives with another model; the dead and its own kind are none."""
        make_desk("kin")
        assert desk.strangers() == []
        other = make_desk("other-1", model="other")
        (told,) = desk.strangers()
        assert "other-1" in told
        die(other)
        assert desk.strangers() == []


def test_workers_register_at_once(make_desk: Callable[..., Desk], database: Database) -> None:
    """Workers that bring up one model at once all register."""
    desks = [Desk(database, MemoryBroker(), "new", f"w{n}") for n in range(6)]
    barrier = threading.Barrier(len(desks))

    def register(desk: Desk) -> None:
        barrier.wait()
        desk.register(INFO, tokenizer_json())

    with ThreadPoolExecutor(len(desks)) as pool:
        list(pool.map(register, desks))
    with database.read() as session:
        assert session.query(Worker).count() == 6


def test_who_begins_a_job_lives(make_desk: Callable[..., Desk], ask: Callable[..., Any]) -> None:
    """A worker that slept beyond its lease and begins a job is no dead one, whatever its last heartbeat says."""
    first, second = make_desk("worker-1"), make_desk("worker-2")
    die(first)
    edit = ask()
    assert first.start(edit) is not None
    assert second.start(edit) is None
