"""Retention: which rows are deleted, and when, on each wiring: service.jobs.retention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, event, func, select, update
from sqlalchemy.orm import Session

from service.application import Services
from service.db.database import Database
from service.db.models import Attestation, IdempotencyKey, Job, JobArtifact, LedgerEntry, StoredFactors, now
from service.errors import Conflict, NotFound
from service.jobs import artifacts, retention
from service.jobs.attestations import PRUNED_WORKERS
from service.jobs.retention import Pruner, Retention
from service.ledger import audit
from service.ledger.audit_coverage import ATTESTATION, EDIT
from service.schemas import EditRequest, TraceRequest
from tests.support.job_rows import MODEL, RECORD, claim_job, commit_edit
from tests.support.workers import WorkerParts

RETENTION = Retention.from_days(90, 7, 90)


@pytest.fixture
def pruner(database: Database) -> Pruner:
    return Pruner(database, RETENTION)


@pytest.fixture
def ended_edit(submit_edit: Callable[..., Any], services: Services, database: Database) -> Callable[..., str]:
    """Return a function that queues and cancels an edit, and moves its end back by a number of days."""

    def make(days: float = 91, subject: str = "Eiffel Tower") -> str:
        edit = str(submit_edit(subject))
        services.edits.revert(edit, "somebody")
        age_jobs(database, days, edit)
        return edit

    return make


def age_jobs(database: Database, days: float, *ids: str) -> None:
    """Move the times of jobs back by a number of days, with audit records; of all jobs when none is named."""
    then = now() - timedelta(days=days)
    with database.write_session() as session:
        statement = update(Job).values(created=then, ended=then)
        session.execute(statement.where(Job.id.in_(ids)) if ids else statement)
        edits = session.execute(select(Job.id).where(Job.kind == EDIT)).all()
        audit.append(session, EDIT, [tuple(row) for row in edits])


def count(database: Database, table: Any) -> int:
    with database.read_session() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_finished_jobs_are_deleted_after_their_time(
    pruner: Pruner, ended_edit: Callable[..., str], services: Services
) -> None:
    """A finished job is deleted after its retention and not before. Its id gets NotFound, which says so."""
    old, recent = ended_edit(91), ended_edit(89)
    assert pruner.count() == Counter(jobs=1)
    assert pruner.prune_all() == {"jobs": 1}
    assert services.edits.get(recent)["status"] == "cancelled"
    for call in (services.edits.get, services.edits.delta):
        with pytest.raises(NotFound, match="deleted when its retention ended"):
            call(old)
    with pytest.raises(NotFound, match="retention"):
        services.edits.revert(old, "somebody")
    with pytest.raises(NotFound, match="retention"):
        services.jobs.retry(old, "somebody")


def test_every_kind_is_deleted_with_its_artifacts(
    pruner: Pruner, services: Services, worker: WorkerParts, database: Database
) -> None:
    """Finished jobs of every kind are deleted, failed ones too, and their artifacts with them."""
    trace = services.traces.submit(TraceRequest(prompt="Nile is", subject="Nile"), "somebody")["id"]
    (edit,) = services.edits.submit([EditRequest(**RECORD)], "somebody")
    for job_id in (trace, edit["id"]):
        job = claim_job(worker, job_id)
        worker.jobs.put_artifact(job, artifacts.RECORDS, b"x")
        worker.jobs.fail(job, Conflict("no."))
    age_jobs(database, 91)
    assert count(database, JobArtifact) == 2
    assert pruner.prune_all() == {"jobs": 2}
    assert count(database, Job) == count(database, JobArtifact) == 0


def test_open_jobs_and_the_ledger_stay(
    pruner: Pruner,
    services: Services,
    worker: WorkerParts,
    submit_edit: Callable[..., Any],
    database: Database,
) -> None:
    """Jobs that wait or run are never deleted, nor are edits that were applied, superseded or reverted."""
    edits = {name: submit_edit(name) for name in ("waits", "runs", "applied", "reverted")}
    claim_job(worker, edits["runs"])
    for name in ("applied", "reverted"):
        commit_edit(worker, edits[name])
    services.edits.revert(edits["reverted"], "somebody")
    newer = submit_edit("applied", "Oslo")
    commit_edit(worker, newer)
    age_jobs(database, 10_000)
    assert pruner.count()["jobs"] == 0
    assert pruner.prune_all().total() == 0
    statuses = [services.edits.get(e)["status"] for e in (*edits.values(), newer)]
    assert statuses == ["queued", "running", "superseded", "reverted", "applied"]
    assert count(database, StoredFactors) == 3 and count(database, LedgerEntry) == 4
    assert services.ledger.verify()["ok"]


def test_pruned_idempotency_key_starts_a_new_request(
    pruner: Pruner, services: Services, database: Database
) -> None:
    """A key that was deleted can be used again, with another body too. A younger one returns its first request."""

    def submit(key: str, target: str) -> str:
        request = EditRequest.model_validate(RECORD | {"target_new": target})
        return str(services.edits.submit([request], "somebody", (key, target))[0]["id"])

    first, young = submit("old", "Rome"), submit("young", "Rome")
    with database.write_session() as session:
        then = now() - timedelta(days=8)
        session.execute(update(IdempotencyKey).where(IdempotencyKey.key == "old").values(created=then))
    assert pruner.count() == Counter(idempotency=1)
    assert pruner.prune_all() == Counter(idempotency=1)
    assert submit("old", "Oslo") != first and submit("young", "Rome") == young


def test_key_of_deleted_jobs_is_a_conflict(pruner: Pruner, services: Services, database: Database) -> None:
    """A request that repeats a key whose jobs were deleted gets Conflict, which says to use a new key."""
    (edit,) = services.edits.submit([EditRequest(**RECORD)], "somebody", ("k", "body"))
    services.edits.revert(edit["id"], "somebody")
    age_jobs(database, 91)
    pruner.prune_all()
    with pytest.raises(Conflict, match="use a new key"):
        services.edits.submit([EditRequest(**RECORD)], "somebody", ("k", "body"))


def test_cursors_work_across_deleted_jobs(
    pruner: Pruner, services: Services, ended_edit: Callable[..., str]
) -> None:
    """The next page of both lists is the same after the last job of the page before was deleted."""
    edits = [ended_edit(80 - n) for n in range(6)]
    of_all_kinds, of_edits = services.jobs.page(limit=2), services.edits.page(limit=2)
    assert [e["id"] for e in (*of_all_kinds["items"], *of_edits["items"])] == [edits[5], edits[4]] * 2

    def next_pages() -> list[Any]:
        return [
            services.jobs.page(cursor=of_all_kinds["next"], limit=9),
            services.edits.page(cursor=of_edits["next"], limit=9),
        ]

    before = next_pages()
    age_jobs(pruner.database, 91, edits[4])
    assert pruner.prune_all() == {"jobs": 1}
    assert next_pages() == before
    assert [[e["id"] for e in page["items"]] for page in before] == [edits[3::-1]] * 2


def test_batches_are_bounded(
    pruner: Pruner, ended_edit: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step deletes at most BATCH_SIZE jobs in a transaction; the next steps continue, and then wait for the next
    search."""
    monkeypatch.setattr(retention, "BATCH_SIZE", 2)
    for _ in range(5):
        ended_edit()
    left = []
    for _ in range(5):
        pruner.step()
        left.append(count(database, Job))
        if not left[-1]:
            ended_edit()
    assert left == [3, 1, 0, 1, 1]
    monkeypatch.setattr(retention, "PRUNE_INTERVAL", 0.0)
    pruner.step()
    assert count(database, Job) == 0


def test_jobs_of_the_ledger_are_passed_over(
    pruner: Pruner,
    submit_edit: Callable[..., Any],
    worker: WorkerParts,
    ended_edit: Callable[..., str],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expired jobs are found behind any number of edits that stay."""
    monkeypatch.setattr(retention, "BATCH_SIZE", 2)
    for n in range(5):
        commit_edit(worker, submit_edit(f"Tower {n}"))
    expired = [ended_edit() for _ in range(3)]
    age_jobs(database, 91)
    assert pruner.prune_all() == {"jobs": len(expired)}
    assert count(database, Job) == 5


def test_retry_during_a_search_keeps_the_job(
    pruner: Pruner,
    services: Services,
    submit_edit: Callable[..., Any],
    worker: WorkerParts,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failed job that is queued again between the search and the deletion is not deleted, nor are its artifacts."""
    edit = submit_edit()
    job = claim_job(worker, edit)
    worker.jobs.put_artifact(job, artifacts.RECORDS, b"x")
    worker.jobs.fail(job, Conflict("no."))
    age_jobs(database, 91)
    write_session = database.write_session

    def retry_first() -> Any:
        monkeypatch.setattr(database, "write_session", write_session)
        services.jobs.retry(edit, "somebody")
        return write_session()

    monkeypatch.setattr(database, "write_session", retry_first)
    assert pruner.prune_all().total() == 0
    assert services.edits.get(edit)["status"] == "queued" and count(database, JobArtifact) == 1


def test_retry_of_a_job_that_is_being_deleted(
    pruner: Pruner, services: Services, ended_edit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is deleted between its reading and its lock gets NotFound."""
    edit = ended_edit()
    get = Session.get

    def delete_after(session: Session, *args: Any, **more: Any) -> Any:
        found = get(session, *args, **more)
        session.execute(delete(Job).where(Job.id == edit))
        return found

    monkeypatch.setattr(Session, "get", delete_after)
    with pytest.raises(NotFound, match="retention"):
        services.jobs.retry(edit, "somebody")


def test_several_processes_at_once(
    ended_edit: Callable[..., str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruners that run at the same time delete every expired row exactly once and do not fail."""
    monkeypatch.setattr(retention, "BATCH_SIZE", 3)
    for _ in range(20):
        ended_edit()
    with ThreadPoolExecutor(4) as pool:
        pruned = list(pool.map(lambda _: Pruner(database, RETENTION).prune_all()["jobs"], range(4)))
    Pruner(database, RETENTION).prune_all()  # rows that were locked by one and passed over by another
    assert count(database, Job) == 0 and sum(pruned) <= 20


def test_zero_days_is_for_ever(database: Database, ended_edit: Callable[..., str]) -> None:
    """With a retention of 0 days nothing is deleted, and no statement is executed."""
    ended_edit(30_000)
    pruner, statements = Pruner(database, Retention.from_days(0, 0, 0)), []
    listen = lambda *args: statements.append(args[2])  # noqa: E731
    event.listen(database.engine, "before_cursor_execute", listen)
    pruner.step()
    event.remove(database.engine, "before_cursor_execute", listen)
    assert statements == [] and pruner.count().total() == 0 and count(database, Job) == 1


def test_a_worker_prunes_in_its_sweep(
    make_worker: Callable[..., WorkerParts], ended_edit: Callable[..., str], database: Database
) -> None:
    """The sweep of a worker deletes expired rows with the retention that it was given."""
    ended_edit()
    make_worker("worker-2").session.notify_lost_jobs()
    assert count(database, Job) == 1
    make_worker("worker-3", model=MODEL, retention=RETENTION).session.notify_lost_jobs()
    assert count(database, Job) == 0


def test_attestations_of_a_worker_that_is_gone(
    make_worker: Callable[..., WorkerParts], services: Services, database: Database
) -> None:
    """The attestations of a worker are deleted after the retention when it is gone. The ledger still verifies."""
    workers = [make_worker(f"worker-{number}", model=MODEL) for number in range(PRUNED_WORKERS + 2)]
    for worker in workers:
        worker.session.register({"name": "tiny"}, "{}")
        worker.session.attest(0, "digest of version 0")
    then = now() - timedelta(days=91)
    with database.write_session() as session:
        session.execute(update(Attestation).values(at=then))
        rows = session.execute(select(Attestation.model, Attestation.version, Attestation.worker)).all()
        audit.append(session, ATTESTATION, [tuple(row) for row in rows])
    pruner = Pruner(database, RETENTION)
    assert pruner.prune_all()["attestations"] == 0  # all are alive
    for worker in workers[1:]:
        worker.session.deregister()
    assert pruner.count()["attestations"] == PRUNED_WORKERS + 1
    assert pruner.prune_all()["attestations"] == PRUNED_WORKERS + 1
    assert count(database, Attestation) == 1
    assert services.ledger.verify()["ok"]
