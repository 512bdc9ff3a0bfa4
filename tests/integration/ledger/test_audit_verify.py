"""What a verification of the ledger detects: with the signatures alone, and only with an anchor outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Boolean, DateTime, Integer, Table, delete, func, select, text, update
from sqlalchemy.orm import Session

from service.application.api_keys import ApiKeys
from service.application.ledger import LedgerService
from service.db.database import Database
from service.db.models import (
    ApiKey,
    Attestation,
    AuditRecord,
    Base,
    Job,
    JsonText,
    LedgerEntry,
    LedgerHead,
    Model,
    StoredFactors,
    UtcDateTime,
    now,
)
from service.kit.signing import SigningKey
from service.ledger import audit
from service.ledger.audit_coverage import (
    API_KEY,
    ATTESTATION,
    COVERAGE,
    EDIT,
    LEDGER,
    VERSION_NAME,
    coverage_query,
)
from service.ledger.audit_verify import verify_records
from service.ledger.head_file import HeadFile
from service.ledger.verify import FACTORS_ROUNDS, VerifiedFactors, verify_ledger
from tests.support.audit_history import (
    AuditedLedger,
    erase_edit,
    forge_key,
    rewrite_chain,
    rewrite_records,
    tamper,
)
from tests.support.job_rows import MODEL
from tests.support.ledger_tampering import drop_append_only_guards

Change = Callable[[Session, AuditedLedger], Any]


@pytest.fixture
def history(database: Database, tmp_path: Path) -> AuditedLedger:
    return AuditedLedger(database, tmp_path)


def rewrite_first_entry(session: Session, _: AuditedLedger) -> None:
    session.execute(update(LedgerEntry).where(LedgerEntry.version == 1).values(actor="nobody"))
    session.execute(delete(LedgerHead))
    rewrite_chain(session)


def rewrite_first_entry_and_records(session: Session, history: AuditedLedger) -> None:
    rewrite_first_entry(session, history)
    rewrite_records(session)


def erase_middle_edit(session: Session, history: AuditedLedger) -> None:
    erase_edit(session, history.middle)
    rewrite_chain(session)
    rewrite_records(session)


def erase_newest_edit_but_not_its_records(session: Session, history: AuditedLedger) -> None:
    kept = session.scalars(select(AuditRecord).order_by(AuditRecord.position)).all()
    erase_edit(session, history.newest)
    session.execute(delete(AuditRecord))
    for record in kept:
        session.expunge(record)
        session.merge(record)


def change_edit(edit: str, **values: Any) -> Change:
    return lambda session, history: session.execute(
        update(Job).where(Job.id == getattr(history, edit)).values(values)
    )


def change_edit_and_records(session: Session, history: AuditedLedger) -> None:
    session.execute(update(Job).where(Job.id == history.first).values(actor="nobody"))
    rewrite_records(session)


def replace_attestations(session: Session, _: AuditedLedger) -> None:
    session.execute(update(Attestation).values(digest="another digest"))


def add_attestation(session: Session, _: AuditedLedger) -> None:
    vote = {"worker": "worker-9", "digest": "digest of version 4", "device": "cpu", "at": now()}
    session.add(Attestation(model=MODEL, version=4, **vote))


def delete_attestation(session: Session, _: AuditedLedger) -> None:
    session.execute(delete(Attestation).where(Attestation.version == 3))


def withdraw_attestation(session: Session, _: AuditedLedger) -> None:
    session.execute(update(Attestation).where(Attestation.version == 4).values(withdrawn=now()))


def insert_key(session: Session, _: AuditedLedger) -> None:
    forge_key(session, "secret")


def change_key(**values: Any) -> Change:
    return lambda session, _: session.execute(update(ApiKey).where(ApiKey.name == "gone").values(values))


def delete_key(session: Session, _: AuditedLedger) -> None:
    session.execute(delete(ApiKey).where(ApiKey.name == "gone"))


def change_factors(session: Session, history: AuditedLedger) -> None:
    session.execute(update(StoredFactors).where(StoredFactors.edit_id == history.first).values(data=b"other"))


def insert_applied_edit(session: Session, history: AuditedLedger) -> None:
    columns = ", ".join(column.name for column in Job.__table__.columns if column.name != "id")
    session.execute(
        text(f"INSERT INTO jobs (id, {columns}) SELECT 'edit_0', {columns} FROM jobs WHERE id = :edit"),
        {"edit": history.rejected},
    )


def sign_everything_again(session: Session, _: AuditedLedger) -> None:
    """Rewrite the first entry, and sign all records with a key of the attacker."""
    key = SigningKey(b"x" * 32)
    rewrite_first_entry(session, _)
    rewrite_records(session)
    previous = audit.GENESIS_HASH
    for record in session.scalars(select(AuditRecord).order_by(AuditRecord.position)).all():
        if record.kind == audit.SIGNER:
            record.subject, record.body = key.id, {"public_key": key.public_key}
        record.signer, record.previous = key.id, previous
        record.hash = previous = audit.record_hash(record)
        record.signature = key.sign(audit.SIGNED_PREFIX + record.hash.encode())


def delete_a_record(session: Session, _: AuditedLedger) -> None:
    session.execute(delete(AuditRecord).where(AuditRecord.position == 5))


def delete_all_records(session: Session, _: AuditedLedger) -> None:
    session.execute(delete(AuditRecord))


#: changes that a verification finds without an anchor -> where it finds them
FOUND_BY_SIGNATURES: dict[str, tuple[Change, str]] = {
    "first entry rewritten": (rewrite_first_entry, "chain"),
    "first entry and records rewritten": (rewrite_first_entry_and_records, "records"),
    "middle edit erased everywhere": (erase_middle_edit, "records"),
    "newest edit erased, records kept": (erase_newest_edit_but_not_its_records, "chain"),
    "actor of an edit": (change_edit("first", actor="nobody"), "edits"),
    "request of an edit": (change_edit("first", request={"subject": "x"}), "edits"),
    "result of an edit": (change_edit("first", result={"es": 0.5}), "edits"),
    "result of a rejected edit": (change_edit("rejected", result={"es": 1.0}), "edits"),
    "error of a failed edit": (change_edit("failed", error=None), "edits"),
    "actor of a waiting edit": (change_edit("queued", actor="nobody"), "edits"),
    "failed edit queued again": (change_edit("failed", status="queued"), "edits"),
    "rejected edit shown as applied": (change_edit("rejected", status="applied"), "edits"),
    "applied edit shown as reverted": (change_edit("first", status="reverted"), "status"),
    "actor of an edit, records rewritten": (change_edit_and_records, "records"),
    "edit inserted": (insert_applied_edit, "edits"),
    "attestations replaced": (replace_attestations, "replicas"),
    "attestation inserted": (add_attestation, "replicas"),
    "attestation deleted": (delete_attestation, "replicas"),
    "attestation withdrawn": (withdraw_attestation, "replicas"),
    "key inserted": (insert_key, "keys"),
    "key with other scopes": (change_key(scopes=["read", "admin"]), "keys"),
    "key with another secret": (change_key(digest="0" * 64), "keys"),
    "revocation undone": (change_key(revoked=None), "keys"),
    "key deleted": (delete_key, "keys"),
    "factors changed": (change_factors, "factors"),
    "everything signed with another key": (sign_everything_again, "records"),
    "one record deleted": (delete_a_record, "records"),
    "all records deleted": (delete_all_records, "edits"),
}


@pytest.mark.parametrize("name", FOUND_BY_SIGNATURES)
def test_found_without_an_anchor(database: Database, history: AuditedLedger, name: str) -> None:
    """A verification without any anchor finds the change, in the place where it is."""
    history.forget_heads()
    assert history.places() == set()
    change, place = FOUND_BY_SIGNATURES[name]
    tamper(database, lambda session: change(session, history))
    assert place in history.places()


def truncate_newest_edit(session: Session, history: AuditedLedger) -> None:
    """Erase the newest edit as if its request had never been sent, with all records since then."""
    since = session.scalar(
        select(func.min(AuditRecord.position)).where(AuditRecord.subject == history.newest)
    )
    erase_edit(session, history.newest)
    session.execute(delete(AuditRecord).where(AuditRecord.position >= since))


def adopt_rewritten_rows(session: Session, history: AuditedLedger) -> None:
    """Rewrite the first entry and delete all records, so that the service adopts what it finds."""
    session.execute(update(Job).where(Job.id == history.first).values(actor="nobody"))
    rewrite_first_entry(session, history)
    session.execute(delete(AuditRecord))
    session.flush()
    session.expunge_all()
    audit._lock_newest(session)


FOUND_BY_ANCHORS: dict[str, Change] = {
    "newest edit erased everywhere": truncate_newest_edit,
    "all records deleted and adopted again": adopt_rewritten_rows,
}


@pytest.mark.parametrize("name", FOUND_BY_ANCHORS)
def test_found_with_an_anchor_only(database: Database, history: AuditedLedger, name: str) -> None:
    """A ledger that is consistent in itself and was truncated or replaced differs from an anchor outside: the file of
    heads, the expected ledger entry, and the expected audit record."""
    before = history.verify()
    assert before["ok"]
    tamper(database, lambda session: FOUND_BY_ANCHORS[name](session, history))
    assert history.places() == {"anchor"}
    history.forget_heads()
    assert history.places() == set()
    assert history.places(f"{before['head']}:{before['head_hash']}") == {"anchor"}
    assert history.places(None, f"{before['record']['position']}:{before['record']['hash']}") == {"anchor"}


def test_newest_key_erased(database: Database, history: AuditedLedger) -> None:
    """A key that is erased with its record is found with the file of heads only."""
    position = history.verify()["record"]["position"]
    key, _ = ApiKeys(database).create("newest", ["admin"])
    tamper(
        database,
        lambda session: (
            session.execute(delete(ApiKey).where(ApiKey.id == key.id)),
            session.execute(delete(AuditRecord).where(AuditRecord.position > position)),
        ),
    )
    assert history.places() == {"anchor"}
    history.forget_heads()
    assert history.places() == set()


@pytest.mark.parametrize(
    "change",
    [
        update(Model).values(name="other"),
        update(ApiKey).values(last_used=now()),
        update(Job).values(updated=now()),
    ],
    ids=["name of the model", "last use of a key", "last change of a job"],
)
def test_what_is_not_covered(database: Database, history: AuditedLedger, change: Any) -> None:
    """Changes of the names of models, the last use of keys and the last change of jobs are not found."""
    tamper(database, lambda session: session.execute(change))
    assert history.places() == set()


# every column


def other_value(column: Any, value: Any) -> Any:
    """Return a value of a column's type that is not this one."""
    if isinstance(column.type, JsonText):
        return {"changed": True} if value != {"changed": True} else None
    if isinstance(column.type, Boolean):
        return not value
    if isinstance(column.type, UtcDateTime | DateTime):
        return now() if value is None else value + timedelta(microseconds=1)
    if isinstance(column.type, Integer):
        return (value or 0) + 1000
    return value + b"x" if isinstance(value, bytes) else f"{value}x"


class Rollback(Exception):
    """Rolls a transaction back."""


def is_found(database: Database, table: Table, row: Any, column: Any) -> bool:
    """Return whether verification finds a changed column of a row. The change is rolled back."""
    found = False
    key = [name == row._mapping[name] for name in table.primary_key.columns]
    try:
        with database.write_session() as session:
            drop_append_only_guards(session)
            session.execute(
                text(
                    "PRAGMA defer_foreign_keys = ON"
                    if database.is_sqlite
                    else "SET session_replication_role = replica"
                )
            )
            session.execute(
                update(table).where(*key).values({column: other_value(column, row._mapping[column])})
            )
            chain = verify_records(session, database.signing_key.public_key)
            found = bool(chain.findings or verify_ledger(session, MODEL))
            raise Rollback
    except Rollback:
        return found


@pytest.mark.parametrize("name", ["jobs", "ledger", "attestations", "api_keys", "factors", "audit_records"])
def test_any_changed_column_is_found(database: Database, history: AuditedLedger, name: str) -> None:
    """A change of any single column of an ended edit, a ledger entry, an attestation, a key, factors or an audit
    record is found, except the last change and the cost of an edit, and the last use of a key."""
    table = Base.metadata.tables[name]
    with database.read_session() as session:
        rows = [row for row in session.execute(select(table)) if row._mapping.get("id") != history.queued]
    columns = [c for c in table.columns if c.name not in ("updated", "last_used", "cost")]
    sample = [rows[0], rows[len(rows) // 2], rows[-1]]
    missed = [
        (column.name, row._mapping.get("id")) for row in sample for column in columns if not is_found(database, table, row, column)
    ]  # fmt: skip
    assert missed == []


# what is kept from one verification to the next


def test_factors_are_read_in_rounds(database: Database, history: AuditedLedger) -> None:
    """The bytes of factors that were verified and then changed are found within FACTORS_ROUNDS verifications, and at
    once by a full one. Their digest and length are compared every time."""
    service = LedgerService(database)
    assert service.verify()["ok"]
    original = history.newest.encode()
    changed = original[:-1] + bytes([original[-1] ^ 1])
    tamper(
        database,
        lambda session: session.execute(
            update(StoredFactors).where(StoredFactors.edit_id == history.newest).values(data=changed)
        ),
    )
    assert not LedgerService(database).verify()["ok"]
    assert not all(service.verify()["ok"] for _ in range(FACTORS_ROUNDS))
    assert not service.verify()["ok"]  # once found, always found
    other = LedgerService(database)
    other._factors.add(history.newest, (_sha256_of(database, history.newest), len(changed)))
    assert not other.verify(full=True)["ok"]


def _sha256_of(database: Database, edit: str) -> str:
    with database.read_session() as session:
        return session.get_one(StoredFactors, edit).sha256


def test_rounds_cover_everything() -> None:
    """In FACTORS_ROUNDS verifications every factor is read, and in each at most a sixteenth, rounded up."""
    verified = VerifiedFactors()
    stored = {f"edit_{n}": (str(n), 1) for n in range(50)}
    assert verified.choose(stored, read_all=False) == set(stored)
    for edit, values in stored.items():
        verified.add(edit, values)
    read = set()
    for _ in range(FACTORS_ROUNDS):
        chosen = verified.choose(stored, read_all=False)
        assert len(chosen) == 4
        read |= chosen
        for edit in chosen:
            verified.add(edit, stored[edit])
    assert read == set(stored)
    assert "edit_7" in verified.choose({**stored, "edit_7": ("other", 1)}, read_all=False)
    assert verified.choose(stored, read_all=True) == set(stored)


def test_signatures_are_verified_once(
    database: Database, history: AuditedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second verification verifies the signatures of new records only."""
    verified: list[str] = []
    check = audit.is_signed_record

    def count(record: AuditRecord, public_key: str) -> bool:
        verified.append(record.hash)
        return check(record, public_key)

    monkeypatch.setattr(audit, "is_signed_record", count)
    service = LedgerService(database)
    records = service.verify()["record"]["position"]
    assert len(verified) == records
    history.submit("Danube")
    verified.clear()
    assert service.verify()["ok"]
    assert len(verified) == 1


# anchors


def test_earlier_anchors_stay_valid(history: AuditedLedger) -> None:
    """Anchors of an earlier verification are in a ledger that has grown."""
    before = history.verify()
    history.apply("Danube")
    anchors = (
        f"{before['head']}:{before['head_hash']}",
        f"{before['record']['position']}:{before['record']['hash']}",
    )
    assert history.verify(*anchors)["ok"]


def test_a_commit_during_a_verification(
    database: Database, history: AuditedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is written after the snapshot of a verification began is not compared with this snapshot."""
    service = LedgerService(database)

    def verify_slowly(session: Session, *args: Any) -> Any:
        session.execute(select(func.count()).select_from(Job)).scalar()  # the snapshot begins
        history.submit("Danube")
        return verify_records(session, *args)

    monkeypatch.setattr("service.application.ledger.verify_records", verify_slowly)
    assert service.verify()["findings"] == []


def test_heads_of_another_database(history: AuditedLedger) -> None:
    """A file of heads from another database is a finding, and `forget` sets it aside."""
    heads = HeadFile(history.folder)
    heads.append({"at": "2026-01-01", "position": 1, "record": "0" * 64})
    assert history.places() == {"anchor"}
    heads.forget()
    assert history.places() == set()


# formats of digests

#: columns of the covered tables that no digest covers -> why
UNCOVERED: dict[str, set[str]] = {
    "jobs": {"reverted_version", "updated", "cost"},  # the first follows from the ledger
    "ledger": set(),
    "attestations": set(),
    "api_keys": {"last_used"},
    "version_names": set(),
}


@pytest.mark.parametrize("kind", COVERAGE)
def test_every_column_is_covered_or_not_on_purpose(kind: str) -> None:
    """Each column of a covered table is in the newest format, or in the list of columns that are not covered. A new
    column needs a new format: the columns of a format never change."""
    coverage = COVERAGE[kind]
    (table,) = {column.class_.__table__ for column in coverage.key}
    query = str(coverage_query(coverage, coverage.newest_format))
    names = {column.name for column in table.columns}
    covered = {name for name in names if f"{table.name}.{name}" in query}
    assert names - covered == UNCOVERED[table.name]
    assert {kind: max(c.formats) for kind, c in COVERAGE.items()} == dict.fromkeys(COVERAGE, 1) | {EDIT: 2}
    sizes = {kind: [len(columns) for columns in c.formats.values()] for kind, c in COVERAGE.items()}
    assert sizes == {LEDGER: [10], EDIT: [22, 24], ATTESTATION: [7], API_KEY: [11], VERSION_NAME: [7]}


def test_records_of_an_older_format_stay_valid(
    database: Database, history: AuditedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a release adds a format, records of the older one are compared in theirs, and new ones in the new one."""
    older = COVERAGE[API_KEY]
    newer = replace(older, formats={**older.formats, 2: (*older.formats[1], ApiKey.last_used)})
    monkeypatch.setitem(COVERAGE, API_KEY, newer)
    keys = ApiKeys(database)
    _, token = keys.create("newer", ["read"])
    assert history.verify()["ok"]
    with database.read_session() as session:
        formats = {
            record.digest.partition(":")[0]
            for record in session.scalars(select(AuditRecord).where(AuditRecord.kind == API_KEY))
        }
    assert formats == {"1", "2"}
    assert keys.verify(token) is not None
    for name in ("gone", "newer"):
        tamper(
            database,
            lambda session, name=name: session.execute(  # type: ignore[misc]
                update(ApiKey).where(ApiKey.name == name).values(scopes=["admin", "read"])
            ),
        )
    details = [finding["detail"] for finding in history.verify()["findings"]]
    assert len(details) == 2 and all("changed" in detail for detail in details)


def test_a_record_of_an_unknown_format(database: Database, history: AuditedLedger, monkeypatch: Any) -> None:
    """A record of a format that this release does not know is a finding, and its key is not accepted."""
    newest = COVERAGE[API_KEY]
    monkeypatch.setitem(COVERAGE, API_KEY, replace(newest, formats={9: newest.formats[1]}))
    _, token = ApiKeys(database).create("newer", ["read"])
    monkeypatch.setitem(COVERAGE, API_KEY, newest)
    assert history.places() == {"keys"}
    assert ApiKeys(database).verify(token) is None
