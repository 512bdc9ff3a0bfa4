"""JobStore: claims, commits of edits, and the ends of jobs."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, update

from service.application import Services
from service.db.database import Database
from service.db.models import Job, JobArtifact
from service.errors import (
    Cancelled,
    Conflict,
    DigestMismatch,
    InvalidInput,
    LeaseLost,
    Unavailable,
    error_document,
)
from service.jobs.broker import Broker
from service.kit import ids
from service.kit.steps import Phase, Progress
from service.ledger import ledger
from service.schemas import EvaluationRequest, TraceRequest
from tests.support.job_rows import (
    MODEL,
    RECORD,
    claim_job,
    commit_edit,
    expire_heartbeat,
    last_event,
    lose_connection_after_commit,
    raise_unavailable,
)
from tests.support.workers import WorkerParts


class TestClaim:
    def test_claim(self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services) -> None:
        """A queued job is claimed, and its row is running."""
        edit = submit_edit()
        job = claim_job(worker, edit)
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
        """A running job is claimed by no other worker, and not twice by one worker."""
        edit = submit_edit()
        assert worker.jobs.claim(edit)
        assert worker.jobs.claim(edit) is None
        assert make_worker("worker-2").jobs.claim(edit) is None

    def test_race(self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]) -> None:
        """Of many concurrent claims of one job, one succeeds."""
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
        """A job that is missing, finished or cancelled is not claimed."""
        edit = submit_edit()
        services.edits.revert(edit, "somebody")
        assert worker.jobs.claim(edit) is None
        assert worker.jobs.claim("edit_gone") is None

    def test_other_model(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """A job of another model is not claimed and stays queued."""
        edit = submit_edit()
        assert make_worker("worker-2", model="other").jobs.claim(edit) is None
        assert services.edits.get(edit)["status"] == "queued"

    def test_orphan(
        self,
        worker: WorkerParts,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
    ) -> None:
        """A job whose worker died is claimed again, and later writes of the dead worker raise LeaseLost."""
        edit = submit_edit()
        stale_job = claim_job(worker, edit)
        expire_heartbeat(worker)
        successor = make_worker("worker-2")
        job = claim_job(successor, edit)
        assert job.attempt == 2
        for write in (
            lambda: worker.jobs.commit_edit(stale_job, 0, b"x", {}, {}),
            lambda: worker.jobs.finish(stale_job, "rejected", {}),
            lambda: worker.jobs.fail(stale_job, RuntimeError("x")),
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
        """Writes of a worker that stalled until its job was exhausted raise LeaseLost."""
        edit = submit_edit()
        for n in range(3):
            worker = make_worker(f"doomed-{n}")
            late = claim_job(worker, edit)
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
        """A job stores the id of the request that submitted it."""
        ids.request_id.set("req-7")
        try:
            assert claim_job(worker, submit_edit()).request_id == "req-7"
        finally:
            ids.request_id.set("")
        assert claim_job(worker, submit_edit()).request_id == ""

    def test_orphan_of_the_same_name(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
    ) -> None:
        """A worker that restarts with the same id claims the jobs that it ran before."""
        edit = submit_edit()
        late = claim_job(make_worker("same"), edit)
        reborn = make_worker("same")
        assert claim_job(reborn, edit).attempt == 2
        with pytest.raises(LeaseLost):
            reborn.jobs.finish(late, "rejected")

    def test_attempts(
        self,
        make_worker: Callable[..., WorkerParts],
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
    ) -> None:
        """A job whose workers die in all attempts fails as exhausted, and its end is published."""
        edit = submit_edit()
        for n in range(3):
            worker = make_worker(f"doomed-{n}")
            assert claim_job(worker, edit).attempt == n + 1
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
        """A requeued job is queued and notified again, and the attempt does not count."""
        edit = submit_edit()
        broker.receive(["edit"], 1, 0)
        worker.jobs.requeue(claim_job(worker, edit))
        assert services.edits.get(edit)["status"] == "queued"
        assert [d.job_id for d in broker.receive(["edit"], 1, 0)] == [edit]
        assert claim_job(worker, edit).attempt == 1


class TestCommitEdit:
    def test_commit_edit(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        broker: Broker,
        database: Database,
    ) -> None:
        """A commit writes the factors, the ledger entry and the row together, and publishes the end."""
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
        """A commit at an older head raises Conflict, and succeeds at the new head."""
        first, second = claim_job(worker, submit_edit()), claim_job(worker, submit_edit("Colosseum"))
        assert worker.jobs.commit_edit(first, 0, b"1", {}, {}) == 1
        with pytest.raises(Conflict, match="head moved"):
            worker.jobs.commit_edit(second, 0, b"2", {}, {})
        assert worker.ledger.head() == 1
        assert worker.jobs.commit_edit(second, 1, b"2", {}, {}) == 2

    def test_race_at_one_head(
        self, make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
    ) -> None:
        """Of concurrent commits at one head, one succeeds and the others raise Conflict."""
        workers = [make_worker(f"racer-{n}") for n in range(4)]
        jobs = [claim_job(worker, submit_edit(f"Tower {n}")) for n, worker in enumerate(workers)]
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
        """A cancellation before the commit raises Cancelled, and nothing is written."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        services.edits.revert(edit, "somebody")
        with pytest.raises(Cancelled):
            worker.jobs.commit_edit(job, 0, b"x", {}, {})
        assert worker.ledger.head() == 0
        worker.jobs.finish(job, "cancelled")
        assert services.edits.get(edit)["status"] == "cancelled"
        with pytest.raises(Exception, match="only an applied edit"):
            services.edits.delta(edit)

    def test_twice(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """A second commit of an edit returns the version of the first."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        assert worker.jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        commit_edit(worker, submit_edit("Colosseum"))
        assert worker.jobs.commit_edit(job, 0, b"x", {}, {}) == 1
        assert worker.ledger.head() == 2

    def test_non_finite_values(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """Infinite and NaN values in a result or a body become null, in the row and in the hash."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        worker.jobs.commit_edit(job, 0, b"x", {"strength": float("nan")}, {"perplexity": float("inf")})
        assert services.edits.get(edit)["result"] == {"perplexity": None}
        assert services.ledger.verify()["ok"]


class TestUnknownCommitOutcome:
    """The connection to the database is lost during a commit."""

    @pytest.fixture
    def job(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> Any:
        return claim_job(worker, submit_edit())

    @pytest.mark.parametrize(
        ("end", "status", "head"),
        [
            (lambda worker, job: worker.jobs.commit_edit(job, 0, b"x", {}, {}), "applied", 1),
            (lambda worker, job: worker.jobs.finish(job, "rejected", {}), "rejected", 0),
            (lambda worker, job: worker.jobs.fail(job, RuntimeError("x")), "failed", 0),
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
        """A committed end stays, whatever the worker does next, and is published then."""
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            end(worker, job)
        repeat = {
            "same": end,
            "requeue": lambda worker, job: worker.jobs.requeue(job),
            "fail": lambda worker, job: worker.jobs.fail(job, RuntimeError("y")),
        }
        repeat[again](worker, job)
        found = services.edits.get(job.id)
        assert (found["status"], worker.ledger.head()) == (status, head)
        assert last_event(broker, job.id).data == found
        assert services.ledger.verify()["ok"]

    def test_claim(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A claim whose outcome is unknown can be repeated and counts another attempt."""
        edit = submit_edit()
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            worker.jobs.claim(edit)
        assert claim_job(worker, edit).attempt == 2

    def test_requeue(
        self, worker: WorkerParts, job: Any, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A requeue whose outcome is unknown raises LeaseLost when it is repeated; the job stays queued."""
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
        """Attest, heartbeat and deregister can be repeated."""
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            write(worker.session)
        write(worker.session)

    def test_outvoted(self, make_worker: Callable[..., WorkerParts], monkeypatch: pytest.MonkeyPatch) -> None:
        """An attestation that lost the vote raises DigestMismatch when it is repeated."""
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
        """Commits succeed while the broker is down."""
        first, second, third = (claim_job(worker, submit_edit(f"Tower {n}")) for n in range(3))
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
        """A job without a commit ends with its status and result, and its end is published."""
        edit = submit_edit()
        worker.jobs.finish(claim_job(worker, edit), status, {"ES": 0.0})
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
        """A failed job stores its error document; Cancelled ends a job as cancelled."""
        edit = submit_edit()
        worker.jobs.fail(claim_job(worker, edit), error)
        found = services.edits.get(edit)
        assert (found["status"], found["error"]) == (status, told)

    def test_trace(self, worker: WorkerParts, services: Services) -> None:
        """A trace ends as done with the version that it ran at."""
        asked = TraceRequest(prompt="The Eiffel Tower is located in", subject="Eiffel Tower")
        trace = services.traces.submit(asked, "somebody")["id"]
        worker.jobs.finish(claim_job(worker, trace), "done", {"version": 0, "effects": [1.0]})
        found = services.traces.get(trace)
        assert (found["status"], found["version"], found["result"]["effects"]) == ("done", 0, [1.0])
        assert services.ledger.verify()["ok"]


class TestProgress:
    def test_progress(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services, broker: Broker
    ) -> None:
        """Progress is published at every step, and written to the row at intervals."""
        edit = submit_edit()
        job = claim_job(worker, edit)
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
        """A cancellation is visible at the next poll of the worker."""
        edit = submit_edit()
        job = claim_job(worker, edit)
        assert not worker.jobs.cancel_requested(job)
        assert services.edits.revert(edit, "somebody")["status"] == "running"
        assert worker.jobs.cancel_requested(job)

    def test_cancel_from_the_row(self, worker: WorkerParts, submit_edit: Callable[..., Any]) -> None:
        """A cancellation whose message was lost is read from the row."""
        edit = submit_edit()
        job = claim_job(worker, edit)
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
        """The next attempt reads the artifacts of the last one. An attempt that lost the job cannot store
        any."""
        stale_job = claim_job(worker, evaluation)
        for data in (b"old", b"new\x00"):
            worker.jobs.put_artifact(stale_job, "a", data)
        expire_heartbeat(worker)
        successor = make_worker("worker-2")
        job = claim_job(successor, evaluation)
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
        """An artifact belongs to one job."""
        job = claim_job(worker, evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        other = services.evaluations.submit(EvaluationRequest(records=[RECORD]), "somebody")["id"]
        assert worker.jobs.get_artifact(claim_job(worker, other), "a") is None

    @pytest.mark.parametrize("end", ["done", "cancelled"])
    def test_gone_with_the_job(
        self, worker: WorkerParts, evaluation: Any, database: Database, end: Any
    ) -> None:
        """The artifacts of a finished job are deleted."""
        job = claim_job(worker, evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        assert self.count(database) == 2  # its records, too
        worker.jobs.finish(job, end)
        assert self.count(database) == 0

    def test_cancelled_before_it_began(self, evaluation: Any, database: Database, services: Services) -> None:
        """The artifacts of a job that is cancelled while it is queued are deleted."""
        services.evaluations.cancel(evaluation)
        assert self.count(database) == 0

    def test_failed(self, worker: WorkerParts, evaluation: Any, services: Services) -> None:
        """A retried job finds the artifacts of its failed attempt."""
        job = claim_job(worker, evaluation)
        worker.jobs.put_artifact(job, "a", b"x")
        worker.jobs.fail(job, RuntimeError("out of memory"))
        services.jobs.retry(evaluation, "admin")
        assert worker.jobs.get_artifact(claim_job(worker, evaluation), "a") == b"x"

    def test_put_artifact_again(
        self, worker: WorkerParts, evaluation: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Storing an artifact can be repeated after an unknown outcome."""
        job = claim_job(worker, evaluation)
        lose_connection_after_commit(worker, monkeypatch)
        with pytest.raises(Unavailable):
            worker.jobs.put_artifact(job, "a", b"x")
        worker.jobs.put_artifact(job, "a", b"x")
        assert worker.jobs.get_artifact(job, "a") == b"x"


def test_claim_refreshes_heartbeat(
    make_worker: Callable[..., WorkerParts], submit_edit: Callable[..., Any]
) -> None:
    """A claim refreshes the heartbeat of a worker whose lease had expired."""
    first, second = make_worker("worker-1"), make_worker("worker-2")
    expire_heartbeat(first)
    edit = submit_edit()
    assert first.jobs.claim(edit) is not None
    assert second.jobs.claim(edit) is None
