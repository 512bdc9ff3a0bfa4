"""A small history of every kind of row that audit records cover, and an attacker who can write to the database."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session, make_transient

from service.application import Services
from service.application.api_keys import ApiKeys
from service.application.ledger import LedgerService
from service.db.database import Database
from service.db.models import Attestation, AuditRecord, Job, LedgerEntry, LedgerHead, StoredFactors
from service.errors import InvalidInput
from service.jobs.memory_broker import MemoryBroker
from service.ledger import audit, ledger
from service.ledger.audit_coverage import COVERAGE, LEDGER, row_digests
from service.ledger.head_file import HeadFile
from service.schemas import EditRequest
from service.settings import Settings
from tests.support.job_rows import MODEL, claim_job, commit_edit
from tests.support.ledger_tampering import drop_append_only_guards
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts


def tamper(database: Database, change: Callable[[Session], Any]) -> None:
    """Carry out a change in the database as its owner, who can disable every trigger."""
    with database.write_session() as session:
        drop_append_only_guards(session)
        if not database.is_sqlite:
            session.execute(text("SET LOCAL session_replication_role = replica"))  # no foreign keys
        change(session)


def rewrite_chain(session: Session) -> None:
    """Compute all hashes of the ledger again, as anybody can who knows the code."""
    session.expire_all()
    previous = ledger.GENESIS_HASH
    for row in session.scalars(select(LedgerEntry).order_by(LedgerEntry.version)).all():
        row.previous = previous
        session.flush()
        (entry,) = ledger.entries(session, MODEL, after=row.version - 1, limit=1)
        row.hash = previous = ledger.chain_hash(entry.previous, entry)
    session.flush()


def rewrite_records(session: Session) -> None:
    """Give the audit records consecutive positions, the digests of the present rows, and matching hashes.

    The signatures stay as they are: the attacker has no key.
    """
    session.expire_all()
    rows = session.scalars(select(AuditRecord).order_by(AuditRecord.position)).all()
    present = {(kind, s): d for kind in COVERAGE for s, d in row_digests(session, kind)}
    for row in rows:
        session.expunge(row)
        make_transient(row)
    session.execute(delete(AuditRecord))
    previous = audit.GENESIS_HASH
    for position, row in enumerate(rows, start=1):
        row.position, row.previous = position, previous
        row.digest = present.get((row.kind, row.subject), row.digest)
        row.hash = previous = audit.record_hash(row)
        session.add(row)
    session.flush()


def erase_edit(session: Session, edit: str) -> None:
    """Erase an edit from every table, with its records, and renumber the entries after it."""
    version = session.scalar(select(LedgerEntry.version).where(LedgerEntry.edit_id == edit))
    assert version is not None
    session.execute(delete(LedgerEntry).where(LedgerEntry.edit_id == edit))
    session.execute(delete(StoredFactors).where(StoredFactors.edit_id == edit))
    session.execute(delete(AuditRecord).where(AuditRecord.subject == edit))
    subject = f"{MODEL}/{version}"
    session.execute(delete(AuditRecord).where(AuditRecord.kind == LEDGER, AuditRecord.subject == subject))
    session.execute(delete(Job).where(Job.id == edit))
    session.execute(delete(LedgerHead))
    later = select(LedgerEntry.version).where(LedgerEntry.version > version).order_by(LedgerEntry.version)
    for number in session.scalars(later).all():
        move_entry(session, number, number - 1)
    session.execute(delete(Attestation).where(Attestation.version >= version))


def move_entry(session: Session, old: int, new: int) -> None:
    """Renumber a ledger entry, its edit and its record."""
    entry = update(LedgerEntry).where(LedgerEntry.version == old)
    session.execute(entry.values(version=new))
    session.execute(update(Job).where(Job.version == old).values(version=new))
    record = update(AuditRecord).where(AuditRecord.subject == f"{MODEL}/{old}")
    session.execute(record.values(subject=f"{MODEL}/{new}"))


def forge_key(session: Session, secret: str, **columns: Any) -> None:
    """Insert an API key whose secret the attacker knows."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    values = {"id": f"key_{'0' * 26}", "name": "forged", "digest": digest, "scopes": '["admin"]', **columns}
    names = ", ".join((*values, "created"))
    marks = ", ".join(f":{name}" for name in values)
    session.execute(text(f"INSERT INTO api_keys ({names}) VALUES ({marks}, '2026-01-01')"), values)


def make_keys(database: Database) -> None:
    """Create two API keys and revoke one."""
    keys = ApiKeys(database)
    keys.create("kept", ["read"])
    keys.create("gone", ["admin"])
    keys.revoke("gone")


class AuditedLedger:
    """Three applied edits, of which the second is reverted, a rejected one, a queued one, attestations and keys."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.broker = MemoryBroker()
        self.services = Services(database, self.broker, Settings(data_dir=folder))
        self.worker = WorkerParts(database, self.broker, MODEL, "worker-1")
        audit.establish(database)
        self.worker.session.register(INFO, tokenizer_json(), ["generate", "edit"])
        self.worker.session.attest(0, "digest of version 0")
        self.first, self.middle = self.apply("Eiffel Tower"), self.apply("Louvre")
        self.services.edits.cancel(self.middle, "another")
        self.rejected = self.submit("Colosseum")
        self.worker.jobs.finish(claim_job(self.worker, self.rejected), "rejected", {"es": 0.0})
        self.failed = self.submit("Pantheon")
        self.worker.jobs.fail(claim_job(self.worker, self.failed), InvalidInput("no."))
        self.queued = self.submit("Big Ben")
        make_keys(database)
        self.worker.session.attest(3, "digest of version 3")
        self.newest = self.apply("Nile")
        self.worker.session.attest(4, "digest of version 4")

    def submit(self, subject: str) -> str:
        request = EditRequest(subject=subject, prompt="The {} is located in", target_new="Rome")
        return str(self.services.edits.submit([request], "somebody")[0]["id"])

    def apply(self, subject: str) -> str:
        edit = self.submit(subject)
        commit_edit(self.worker, edit)
        return edit

    def verify(self, *anchors: str | None, **options: Any) -> dict[str, Any]:
        """Return a verification by a new process, which remembers nothing."""
        expect, expect_record = (*anchors, None, None)[:2]
        return LedgerService(self.database).verify(expect, expect_record, **options)

    def places(self, *anchors: str | None, **options: Any) -> set[str]:
        """Return where the findings of a verification are."""
        return {finding["where"] for finding in self.verify(*anchors, **options)["findings"]}

    def forget_heads(self) -> None:
        """Remove the anchor outside the database."""
        HeadFile(self.folder).forget()
