"""Audit records: a chain of signed records of the rows that the service shows.

A record holds the digest of a row. It is appended in the transaction that writes the row, and signed with a key outside
the database, so a later change of the row, or of a record, is noticed (`service/ledger/audit_verify.py`). The newest
record of a row is the valid one. An append takes the lock of the records: call it last in a transaction.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from service.db.advisory_locks import AdvisoryLock
from service.db.database import Database, database_of, run_after_commit
from service.db.models import AuditRecord, now
from service.errors import Misconfigured
from service.kit.signing import SigningKey, is_signed
from service.ledger.audit_coverage import (
    COVERAGE,
    PrimaryKey,
    canonical_values,
    format_of,
    iso_microseconds,
    row_digests,
    subject_of,
)
from service.ledger.head_file import HeadFile

log = logging.getLogger(__name__)

SIGNER = "signer"  #: kind of a record that introduces a key; its body has the public keys
REMOVAL = "removal"  #: kind of a record that removes the attestations of the workers in its body
GENESIS_HASH = "0" * 64  #: the previous hash of the first record
SIGNED_PREFIX = b"palimpsest audit record "  # a signature is of no use outside of this table
ENDORSED_PREFIX = b"palimpsest ledger key "


def record_hash(record: AuditRecord) -> str:
    """Return sha256 over the previous hash and all fields of a record except its hash and signature."""
    fields = [
        record.position,
        record.kind,
        record.subject,
        record.digest,
        record.body,
        record.at,
        record.signer,
    ]
    return hashlib.sha256(record.previous.encode() + canonical_values(fields)).hexdigest()


def is_signed_record(record: AuditRecord, public_key: str) -> bool:
    """Return whether the hash of a record was signed with this key."""
    return is_signed(public_key, SIGNED_PREFIX + record.hash.encode(), record.signature)


def endorsement_message(previous_hash: str, public_key: str) -> bytes:
    """Return what the old key signs when a new key replaces it."""
    return ENDORSED_PREFIX + previous_hash.encode() + public_key.encode()


# appending


def append(
    session: Session, kind: str, keys: Sequence[PrimaryKey], entry: Mapping[str, Any] | None = None
) -> None:
    """Append a record of each row with one of these primary keys, in its present state.

    `entry` has the fields of a ledger entry that are written to the file of heads.
    """
    if not keys:
        return
    session.flush()
    newest = _lock_newest(session)
    digests = dict(row_digests(session, kind, keys))
    for subject in map(subject_of, keys):
        newest = _add(session, newest, kind, subject, digests[subject])
    _write_head_after_commit(session, newest, entry)


def append_removal(session: Session, workers: Sequence[PrimaryKey]) -> None:
    """Append a record that the attestations of these pairs of a model and a worker are removed."""
    removed = {"attestations": [list(pair) for pair in workers]}
    record = _add(session, _lock_newest(session), REMOVAL, "", "", removed)
    _write_head_after_commit(session, record, None)


def establish(database: Database) -> None:
    """Start the records of a database that has none: existing rows are adopted as they are.

    Raises Misconfigured if the newest record was signed with another key.
    """
    with database.write_session() as session:
        _lock_newest(session)


def newest_record(session: Session) -> AuditRecord | None:
    """Return the newest record."""
    return session.scalar(select(AuditRecord).order_by(AuditRecord.position.desc()).limit(1))


def _lock_newest(session: Session, any_signer: bool = False) -> AuditRecord:
    """Lock the records until the transaction ends, and return the newest. The first call adopts all existing rows."""
    database = database_of(session)
    if not database.is_sqlite:  # a write session of SQLite excludes all others
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": AdvisoryLock.AUDIT_RECORDS})
    newest = newest_record(session) or _adopt(session, database.signing_key)
    if newest.signer != database.signing_key.id and not any_signer:
        raise Misconfigured(
            f"this process has the ledger key {database.signing_key.id}, and the newest audit record was signed with "
            f"{newest.signer}. Give every process the same key (PALIMPSEST_LEDGER_KEY, or the file ledger.key in the data "
            "folder), or replace the key with `palimpsest audit rotate`. If neither key is new, the database was modified."
        )
    return newest


def _adopt(session: Session, key: SigningKey) -> AuditRecord:
    """Write the first record, which names the key, and a record of every existing row."""
    body = {"action": "established", "public_key": key.public_key}
    newest = _add(session, None, SIGNER, key.id, "", body)
    for kind in COVERAGE:
        for subject, digest in list(row_digests(session, kind)):
            newest = _add(session, newest, kind, subject, digest, {"action": "adopted"})
    if newest.position > 1:
        log.warning("existing rows adopted by the audit records", extra={"rows": newest.position - 1})
    _write_head_after_commit(session, newest, None)
    return newest


def _add(
    session: Session,
    newest: AuditRecord | None,
    kind: str,
    subject: str,
    digest: str,
    body: Mapping[str, Any] | None = None,
    signer: SigningKey | None = None,
) -> AuditRecord:
    key = signer or database_of(session).signing_key
    position, previous = (newest.position + 1, newest.hash) if newest else (1, GENESIS_HASH)
    record = AuditRecord(
        position=position, kind=kind, subject=subject, digest=digest, body=dict(body or {}), at=now()
    )
    record.signer, record.previous = key.id, previous
    record.hash = record_hash(record)
    record.signature = key.sign(SIGNED_PREFIX + record.hash.encode())
    session.add(record)
    return record


def _write_head_after_commit(session: Session, record: AuditRecord, entry: Mapping[str, Any] | None) -> None:
    head = {
        "at": iso_microseconds(record.at),
        "position": record.position,
        "record": record.hash,
        **(entry or {}),
    }
    previous = session.info.get(HEAD, {})
    session.info[HEAD] = head = {**previous, **head}
    folder = database_of(session).data_dir
    if folder is not None:
        run_after_commit(session, HEAD, lambda: HeadFile(folder).append(head))


HEAD = "audit_head"  # key in the `info` of a session: the newest record of its transaction


# checking one row


def is_intact(session: Session, kind: str, key: PrimaryKey) -> bool:
    """Return whether a row is as its newest record says, and that record was signed with a key of this ledger."""
    subject = subject_of(key)
    newest = session.scalar(
        select(AuditRecord)
        .where(AuditRecord.kind == kind, AuditRecord.subject == subject)
        .order_by(AuditRecord.position.desc())
        .limit(1)
    )
    if newest is None or format_of(newest.digest) not in COVERAGE[kind].formats:
        return False
    if dict(row_digests(session, kind, [key], format_of(newest.digest))).get(subject) != newest.digest:
        return False
    public_key = _trusted_keys(session, database_of(session).signing_key).get(newest.signer)
    return public_key is not None and _is_authentic(newest, public_key)


def _is_authentic(record: AuditRecord, public_key: str) -> bool:
    return record.hash == record_hash(record) and is_signed_record(record, public_key)


def _trusted_keys(session: Session, key: SigningKey) -> dict[str, str]:
    """Return the public keys by id: that of this process, and each that a trusted key says it has replaced."""
    trusted = {key.id: key.public_key}
    signers = select(AuditRecord).where(AuditRecord.kind == SIGNER).order_by(AuditRecord.position.desc())
    for record in session.scalars(signers):
        public_key = trusted.get(record.subject)
        replaced = record.body.get("previous")
        if public_key is not None and replaced is not None and _is_authentic(record, public_key):
            trusted[replaced["id"]] = replaced["public_key"]
    return trusted


# rotation


def rotate(database: Database, new_key: SigningKey, lost: bool = False) -> None:
    """Append a record that replaces the key by a new one, signed by the new key.

    The old key, which `database` has, endorses the new one, so that an auditor who knows the old public key can follow.
    `lost`: the old key is lost; it is not needed, and there is no endorsement.
    """
    with database.write_session() as session:
        newest = _lock_newest(session, any_signer=lost)
        if newest.signer == new_key.id:
            raise Misconfigured(f"{new_key.id} is the ledger's key already: create a new one.")
        signers = select(AuditRecord).where(AuditRecord.kind == SIGNER, AuditRecord.subject == newest.signer)
        introduced = session.scalars(signers.order_by(AuditRecord.position.desc())).first()
        public_key = introduced.body["public_key"] if introduced else ""
        body: dict[str, Any] = {
            "action": "rotated",
            "public_key": new_key.public_key,
            "previous": {"id": newest.signer, "public_key": public_key},
            "endorsement": None,
        }
        if not lost:
            message = endorsement_message(newest.hash, new_key.public_key)
            body["endorsement"] = database.signing_key.sign(message)
        record = _add(session, newest, SIGNER, new_key.id, "", body, new_key)
        _write_head_after_commit(session, record, None)
