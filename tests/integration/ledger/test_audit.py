"""Audit records: appending, adoption of existing rows, the key and its rotation, and what depends on them."""

from __future__ import annotations

import logging
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, select, text, update

from service.application import ledger as ledger_service
from service.application.api_keys import ApiKeys
from service.application.ledger import LedgerService
from service.db.database import Database
from service.db.models import ApiKey, Attestation, AuditRecord, Job, Worker, now
from service.errors import InvalidInput, Misconfigured
from service.jobs.attestations import prune_attestations
from service.jobs.job_store import CHANGED_ROW
from service.kit.signing import KEY_FILE, SigningKey
from service.ledger import audit
from service.ledger.audit_coverage import API_KEY, ATTESTATION, EDIT, LEDGER, row_digests
from service.ledger.audit_verify import verify_records
from service.ledger.head_file import FILE_NAME, HeadFile
from tests.support.audit_history import AuditedLedger, forge_key, tamper
from tests.support.job_rows import MODEL, claim_job, commit_edit
from tests.support.statement_counts import counting_statements_and_rows

NEW_KEY = SigningKey(b"n" * 32)


@pytest.fixture
def history(database: Database, tmp_path: Path) -> AuditedLedger:
    return AuditedLedger(database, tmp_path)


def records(database: Database) -> list[AuditRecord]:
    with database.read_session() as session:
        return list(session.scalars(select(AuditRecord).order_by(AuditRecord.position)))


def findings(database: Database, public_key: str) -> list[str]:
    with database.read_session() as session:
        return [finding.detail for finding in verify_records(session, public_key).findings]


# appending


def test_what_is_recorded(database: Database, history: AuditedLedger) -> None:
    """Submission, end and retry of an edit, a ledger entry, an attestation and an API key have a record each."""
    history.services.jobs.retry(history.failed, "somebody")
    kinds = [(record.kind, record.subject) for record in records(database)]
    assert kinds[0] == (audit.SIGNER, database.signing_key.id)
    for edit, count in ((history.first, 2), (history.rejected, 2), (history.failed, 3), (history.queued, 1)):
        assert kinds.count((EDIT, edit)) == count
    assert [s for kind, s in kinds if kind == LEDGER] == [f"{MODEL}/{v}" for v in (1, 2, 3, 4)]
    assert [s for kind, s in kinds if kind == ATTESTATION] == [f"{MODEL}/{v}/worker-1" for v in (0, 3, 4)]
    assert sum(kind == API_KEY for kind, _ in kinds) == 3  # two created, one revoked
    assert history.verify()["ok"]


def test_a_cancelled_edit_is_recorded(database: Database, history: AuditedLedger) -> None:
    """A waiting edit that is cancelled has a record of its end, and a running one as well."""
    history.services.edits.cancel(history.queued, "somebody")
    running = history.submit("Danube")
    job = claim_job(history.worker, running)
    history.services.edits.cancel(running, "somebody")
    history.worker.jobs.finish(job, "cancelled")
    assert history.verify()["ok"]
    with database.read_session() as session:
        assert {session.get_one(Job, edit).status for edit in (history.queued, running)} == {"cancelled"}


def test_rows_of_edits_without_effect_may_be_deleted(database: Database, history: AuditedLedger) -> None:
    """A rejected or failed edit whose row is deleted is not a finding. An applied one is."""
    tamper(database, lambda session: session.execute(delete(Job).where(Job.id == history.rejected)))
    assert history.verify()["ok"]


def test_an_append_reads_a_constant_number_of_rows(database: Database, history: AuditedLedger) -> None:
    """An append runs as many statements and loads as many rows after 80 further records as before them."""
    counts = []
    for version in (1, 2):
        with counting_statements_and_rows(database) as counted, database.write_session() as session:
            audit.append(session, LEDGER, [(MODEL, version)])
        counts.append(counted)
        with database.write_session() as session:
            for _ in range(80):
                audit.append(session, LEDGER, [(MODEL, 3)])
    assert counts[0] == counts[1]
    assert counts[0]["rows"] <= 2


def test_concurrent_appends_make_one_chain(database: Database, tmp_path: Path) -> None:
    """Appends of several connections at once make one chain without gaps, also the first ones of a database."""
    databases = [Database(database.engine.url, tmp_path) for _ in range(4)]

    def create(n: int) -> None:
        ApiKeys(databases[n % 4]).create(f"key-{n}", ["read"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(24)))
    for one in databases:
        one.close()
    assert [record.position for record in records(database)][-1] >= 25
    assert findings(database, database.signing_key.public_key) == []
    assert len({head["position"] for head in HeadFile(tmp_path).heads()}) == 24


def test_a_rolled_back_append_leaves_no_head(database: Database, history: AuditedLedger) -> None:
    """Neither a record nor a head is written by a transaction that is rolled back."""
    before = len(records(database)), HeadFile(history.folder).heads()

    def fail() -> None:
        with database.write_session() as session:
            audit.append(session, LEDGER, [(MODEL, 1)])
            raise InvalidInput("rolled back.")

    with pytest.raises(InvalidInput):
        fail()
    assert (len(records(database)), HeadFile(history.folder).heads()) == before


# heads


def test_heads_of_landings(
    database: Database, history: AuditedLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """Each apply and each revert writes its version and hash to the file of heads and to the log."""
    with caplog.at_level(logging.INFO), database.read_session():
        edit = history.apply("Danube")
        history.services.edits.cancel(edit, "somebody")
    verification = history.verify()
    of_entries = [head for head in HeadFile(history.folder).heads() if "version" in head]
    assert [head["version"] for head in of_entries] == [1, 2, 3, 4, 5, 6]
    assert (of_entries[-1]["model"], of_entries[-1]["hash"]) == (MODEL, verification["head_hash"])
    logged = [record for record in caplog.records if record.getMessage() == "ledger head"]
    assert {getattr(record, "version", None) for record in logged} >= {5, 6}


def test_a_head_that_cannot_be_written(
    database: Database, history: AuditedLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """When the file of heads cannot be written, the commit succeeds and a warning is logged."""
    (history.folder / FILE_NAME).unlink()
    (history.folder / FILE_NAME).mkdir()
    edit = history.apply("Danube")
    assert "the head of the ledger was not written" in caplog.text
    with database.read_session() as session:
        assert session.get_one(Job, edit).status == "applied"


# adoption


def test_existing_rows_are_adopted(database: Database, history: AuditedLedger) -> None:
    """The first record of a database that has rows is followed by a record of each row, marked as adopted. A later
    change of an adopted row is found."""
    tamper(database, lambda session: session.execute(delete(AuditRecord)))
    history.forget_heads()
    assert history.places() == {"chain", "edits", "replicas", "keys"}
    audit.establish(database)
    assert history.verify()["ok"]
    first, *others = records(database)
    assert first.body["action"] == "established"
    assert {record.body["action"] for record in others} == {"adopted"}
    assert len(others) == 4 + 6 + 3 + 2  # entries, edits, attestations, keys
    tamper(
        database,
        lambda session: session.execute(update(Job).where(Job.id == history.first).values(actor="x")),
    )
    assert history.places() == {"edits"}


def test_a_new_database_has_one_record(database: Database) -> None:
    """Establishing twice writes the key once."""
    audit.establish(database)
    audit.establish(database)
    (record,) = records(database)
    assert record.body == {"action": "established", "public_key": database.signing_key.public_key}


# the key


def test_another_key_is_refused(database: Database, history: AuditedLedger) -> None:
    """A process with another key than that of the newest record neither starts nor appends, and both keys are named."""
    other = Database(database.engine.url, history.folder, "ab" * 32)
    with pytest.raises(
        Misconfigured, match=rf"{other.signing_key.id}.*{database.signing_key.id}.*audit rotate"
    ):
        audit.establish(other)
    with pytest.raises(Misconfigured):
        ApiKeys(other).create("new", ["read"])
    other.close()
    assert history.verify()["ok"]


def test_a_rotation_is_endorsed_by_the_old_key(database: Database, history: AuditedLedger) -> None:
    """After a rotation the new key verifies the ledger, and an auditor who knows the old public key follows it."""
    old = database.signing_key.public_key
    audit.rotate(database, NEW_KEY)
    rotated = Database(database.engine.url, history.folder, (b"n" * 32).hex())
    ApiKeys(rotated).create("new", ["read"])
    assert findings(database, NEW_KEY.public_key) == findings(database, old) == []
    assert LedgerService(rotated).verify()["ok"]
    with pytest.raises(Misconfigured):
        audit.establish(database)  # the old key has ended
    with pytest.raises(Misconfigured, match="already"):
        audit.rotate(rotated, NEW_KEY)
    with rotated.read_session() as session:  # rows that were recorded with the old key
        key = session.scalars(select(ApiKey).where(ApiKey.name == "kept")).one()
        assert audit.is_intact(session, API_KEY, (key.id,))
    rotated.close()


def test_a_lost_key_is_replaced_without_endorsement(database: Database, history: AuditedLedger) -> None:
    """A lost key can be replaced. The new key verifies the ledger; an auditor who knows the old one sees that it did
    not agree."""
    old = database.signing_key.public_key
    without_key = Database(database.engine.url, history.folder, "cd" * 32)
    with pytest.raises(Misconfigured):
        audit.rotate(without_key, NEW_KEY)
    audit.rotate(without_key, NEW_KEY, lost=True)
    without_key.close()
    assert findings(database, NEW_KEY.public_key) == []
    assert ["did not endorse" in detail for detail in findings(database, old)] == [True]


def test_a_forged_rotation_is_found(database: Database, history: AuditedLedger) -> None:
    """A rotation to a key of an attacker who has not the old one is a finding for whoever trusts the old key."""
    attacker = Database(database.engine.url, history.folder, "ef" * 32)
    audit.rotate(attacker, attacker.signing_key, lost=True)
    ApiKeys(attacker).create("backdoor", ["admin"])
    attacker.close()
    assert history.places() == {"records"}


def test_the_key_is_outside_the_database(database: Database, tmp_path: Path) -> None:
    """Without a setting the key is in a file of the data folder that only its owner can read."""
    audit.establish(database)
    file = tmp_path / KEY_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert Database(database.engine.url, tmp_path).signing_key.id == database.signing_key.id


# what is refused


def test_a_forged_api_key_is_not_accepted(database: Database, history: AuditedLedger) -> None:
    """A key that was inserted into the database, or changed there, is not accepted."""
    secret = "s" * 43
    tamper(database, lambda session: forge_key(session, secret))
    keys = ApiKeys(database)
    assert keys.verify(f"pal_{'0' * 26}_{secret}") is None
    info, token = keys.create("honest", ["read"])
    assert keys.verify(token) is not None
    tamper(
        database,
        lambda session: session.execute(update(ApiKey).where(ApiKey.id == info.id).values(scopes=["admin"])),
    )
    assert ApiKeys(database).verify(token) is None


def test_deleting_all_keys_does_not_open_the_service(database: Database, history: AuditedLedger) -> None:
    """A service whose keys were deleted from the database still requires one."""
    tamper(database, lambda session: session.execute(delete(ApiKey)))
    assert ApiKeys(database).any_exist()


def test_a_forged_job_is_not_carried_out(database: Database, history: AuditedLedger) -> None:
    """A waiting edit that was inserted into the database fails, and stays a finding."""
    columns = [column.name for column in Job.__table__.columns if column.name != "id"]
    copied = select(text("'edit_forged'"), *(getattr(Job, name) for name in columns)).where(
        Job.id == history.queued
    )
    tamper(database, lambda session: session.execute(insert(Job).from_select(["id", *columns], copied)))
    assert history.worker.jobs.claim("edit_forged") is None
    with database.read_session() as session:
        job = session.get_one(Job, "edit_forged")
        assert (job.status, job.error["detail"]) == ("failed", CHANGED_ROW)  # type: ignore[index]
    assert history.places() == {"edits"}


def test_an_edit_changed_while_it_runs_is_not_committed(database: Database, history: AuditedLedger) -> None:
    """An edit whose request was changed in the database after the worker began it is not applied."""
    edit = history.submit("Danube")
    job = claim_job(history.worker, edit)
    tamper(
        database, lambda session: session.execute(update(Job).where(Job.id == edit).values(actor="nobody"))
    )
    with pytest.raises(InvalidInput, match="not the one that was submitted"):
        history.worker.jobs.commit_edit(job, 4, b"factors", {}, {})
    history.worker.jobs.fail(job, InvalidInput(CHANGED_ROW))
    verification = history.verify()
    assert verification["head"] == 4
    assert {finding["where"] for finding in verification["findings"]} == {"edits"}


# attestations


def test_pruned_attestations_are_no_finding(database: Database, history: AuditedLedger) -> None:
    """`prune_attestations` deletes those of workers that are gone and attested nothing since then. Verification accepts
    this deletion, and no other."""
    history.worker.session.deregister()
    for worker in ("worker-2", "worker-3"):
        with database.write_session() as session:
            session.add(
                Attestation(
                    model=MODEL,
                    version=4,
                    worker=worker,
                    digest="digest of version 4",
                    device="cpu",
                    at=now(),
                )
            )
            audit.append(session, ATTESTATION, [(MODEL, 4, worker)])
    with database.write_session() as session:
        row = {"roles": [], "version": 4, "heartbeat": now(), "started": now(), "host": "h", "pid": 1}
        session.add(Worker(id="worker-3", model=MODEL, **row))
    with database.write_session() as session:
        assert prune_attestations(session, now() - timedelta(days=1)) == 0
        assert prune_attestations(session, now()) == 4
    verification = history.verify()
    assert verification["ok"]
    assert [replica["worker"] for replica in verification["replicas"]] == ["worker-3"]
    tamper(database, lambda session: session.execute(delete(Attestation)))
    assert history.places() == {"replicas"}


def test_a_pruned_worker_can_attest_again(database: Database, history: AuditedLedger) -> None:
    """Attestations after a deletion count again."""
    history.worker.session.deregister()
    with database.write_session() as session:
        prune_attestations(session, now())
    history.worker.session.attest(4, "digest of version 4")
    assert history.verify()["ok"]
    tamper(database, lambda session: session.execute(delete(Attestation)))
    assert history.places() == {"replicas"}


def test_a_withdrawal_is_recorded(database: Database, history: AuditedLedger) -> None:
    """A quarantine withdraws all attestations of a worker with a record of each."""
    history.worker.session.quarantine("test")
    assert history.verify()["ok"]
    tamper(database, lambda session: session.execute(update(Attestation).values(withdrawn=None)))
    assert history.places() == {"replicas"}


def test_a_retried_commit_adds_no_record(database: Database, history: AuditedLedger) -> None:
    """A commit that is repeated because its outcome was unknown adds no further record."""
    edit = history.submit("Danube")
    job = claim_job(history.worker, edit)
    commits = [history.worker.jobs.commit_edit(job, 4, b"factors", {"seed": 1}, {}) for _ in range(2)]
    assert commits == [5, 5]
    assert sum(record.subject == edit for record in records(database)) == 2
    commit_edit(history.worker, history.queued)
    assert history.verify()["ok"]


def test_answer_of_a_verification_is_bounded(
    database: Database, history: AuditedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification returns its first findings with their number, and the newest attestations."""
    monkeypatch.setattr(ledger_service, "MAX_FINDINGS", 2)
    monkeypatch.setattr(ledger_service, "MAX_REPLICAS", 2)
    tamper(database, lambda session: session.execute(update(Job).values(actor="mallory")))
    verification = history.verify()
    assert len(verification["findings"]) == 2 < verification["finding_count"]
    assert [replica["version"] for replica in verification["replicas"]] == [3, 4]


def test_memory_of_digests_does_not_grow_with_the_rows(database: Database, history: AuditedLedger) -> None:
    """The digests of rows are computed some rows at a time: those of 40 MB of edits take less than 20 MB."""
    request = {"prompt": "x" * 500_000}
    with database.write_session() as session:
        for number in range(80):
            fields = {
                "kind": "edit",
                "model": MODEL,
                "status": "queued",
                "actor": "a",
                "subject": "x",
                "fact_key": "x",
            }
            times = {"created": now(), "updated": now()}
            session.add(Job(id=f"edit_{number:03}", request=request, **fields, **times))
    with database.read_session() as session:
        tracemalloc.start()
        try:
            count = sum(1 for _ in row_digests(session, EDIT))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert count > 80
    assert peak < 20_000_000
