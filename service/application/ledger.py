"""The ledger: list its entries and verify it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.application.served_model import get_served_model
from service.application.version_names import find_version
from service.db.database import Database
from service.db.models import Attestation, LedgerEntry
from service.errors import InvalidInput, QueueFull
from service.jobs.views import ResourceDict
from service.kit.pagination import decode_cursor, encode_cursor, validate_limit
from service.ledger import ledger
from service.ledger.audit_verify import (
    RecordChain,
    VerifiedSignatures,
    check_heads,
    entry_hash,
    hash_at,
    verify_records,
)
from service.ledger.head_file import HeadFile
from service.ledger.verify import LedgerFinding, VerifiedFactors, VerifiedStates, verify_ledger
from service.schemas import Version

MAX_VERIFICATIONS = 3  #: verifications of a process that run or wait; more are rejected
MAX_FINDINGS = 1000  #: findings that a verification returns
MAX_REPLICAS = 1000  #: attestations that a verification returns
_ANCHOR = re.compile(r"([0-9]{1,9}):([0-9a-f]{64})")


class LedgerService:
    """Reads the ledger of the served model."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._verification = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_VERIFICATIONS)
        self._states: VerifiedStates = {}
        self._factors = VerifiedFactors()
        self._signatures: VerifiedSignatures = set()

    def head(self) -> int:
        with self.database.read_session() as session:
            return ledger.head(session, get_served_model(session).fingerprint)

    def page(
        self,
        cursor: str | None = None,
        limit: int = 50,
        version: Version | None = None,
        newest_first: bool = False,
    ) -> ResourceDict:
        """Return {"items": entries, "next": cursor or None, "head"}; with `version` only entries up to it."""
        validate_limit(limit)
        last_version = decode_cursor(cursor, int)
        with self.database.read_session() as session:
            model = get_served_model(session)
            up_to = None if version is None else find_version(session, model, version)
            if newest_first:
                before = up_to + 1 if last_version is None and up_to is not None else last_version
                page_entries = ledger.newest_entries(session, model.fingerprint, before, limit + 1)
            else:
                page_entries = ledger.entries(session, model.fingerprint, last_version or 0, up_to, limit + 1)
            items = [entry.as_dict() for entry in page_entries[:limit]]
            next_cursor = (
                encode_cursor(page_entries[limit - 1].version) if len(page_entries) > limit else None
            )
            return {"items": items, "next": next_cursor, "head": ledger.head(session, model.fingerprint)}

    def verify(
        self,
        expect: str | None = None,
        expect_record: str | None = None,
        full: bool = False,
        public_key: str | None = None,
    ) -> ResourceDict:
        """Verify the chains, the signatures, the factors, all rows with audit records, and the weight digests.

        `expect` and `expect_record` are anchors that the caller noted: VERSION:HASH of a ledger entry, and
        POSITION:HASH of an audit record. `full` reads the bytes of all factors. `public_key` is the trusted key; None:
        that of this process.

        Verifications of a process run one after another, each on a connection of its own.
        """
        anchors = parse_anchor(expect, "expect"), parse_anchor(expect_record, "expect_record")
        trusted = public_key or self.database.signing_key.public_key
        with self._one_at_a_time() as heads, self.database.dedicated_read_session() as session:
            model = get_served_model(session).fingerprint
            chain = verify_records(session, trusted, self._signatures)
            findings = [
                *verify_ledger(session, model, self._states, self._factors, full),
                *chain.findings,
                *_check_anchors(session, model, chain, *anchors),
                *check_heads(session, chain, heads),
            ]
            return {
                "ok": not findings,
                "findings": [asdict(finding) for finding in findings[:MAX_FINDINGS]],
                "finding_count": len(findings),
                **_summary(session, model),
                "record": chain.newest,
                "public_key": chain.signers[-1] if chain.signers else None,
                "replicas": _replicas(session, model),
            }

    @contextmanager
    def _one_at_a_time(self) -> Iterator[list[dict[str, Any]]]:
        """Wait for other verifications, and yield the heads outside the database.

        They are read before the snapshot of the database begins, which then contains all of them. Raises QueueFull when
        too many verifications wait: each holds a thread.
        """
        if not self._places.acquire(blocking=False):
            raise QueueFull("other verifications of the ledger run: retry when they have ended.")
        try:
            with self._verification:
                yield HeadFile(self.database.data_dir).heads() if self.database.data_dir else []
        finally:
            self._places.release()


def _check_anchors(
    session: Session,
    model: str,
    chain: RecordChain,
    entry: tuple[int, str] | None,
    record: tuple[int, str] | None,
) -> Iterator[LedgerFinding]:
    if entry and entry_hash(session, model, entry[0]) != entry[1]:
        yield LedgerFinding("anchor", entry[0], f"version {entry[0]} does not have the expected hash")
    if record and hash_at(chain, record[0]) != record[1]:
        yield LedgerFinding("anchor", None, f"audit record {record[0]} does not have the expected hash")


def parse_anchor(text: str | None, field: str) -> tuple[int, str] | None:
    """Return the number and the hash of an anchor such as 12:5f...; None for None. Raises InvalidInput."""
    if text is None:
        return None
    match = _ANCHOR.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"`{field}` must be a number and a hash of 64 hexadecimal digits, joined by a colon.", field
        )
    return int(match[1]), match[2]


def _summary(session: Session, model: str) -> ResourceDict:
    count = select(func.count()).select_from(LedgerEntry).where(LedgerEntry.model == model)
    head = ledger.head(session, model)
    return {
        "entries": session.scalar(count),
        "head": head,
        "head_hash": entry_hash(session, model, head),
    }


def _replicas(session: Session, model: str) -> list[ResourceDict]:
    """Return the newest MAX_REPLICAS attestations, by version."""
    newest_first = (Attestation.version.desc(), Attestation.worker.desc())
    rows = select(Attestation).where(Attestation.model == model).order_by(*newest_first).limit(MAX_REPLICAS)
    return [
        {
            "worker": r.worker,
            "version": r.version,
            "digest": r.digest,
            "device": r.device,
            "at": ledger.iso_utc(r.at),
            "withdrawn": ledger.iso_utc(r.withdrawn) if r.withdrawn else None,
        }
        for r in session.scalars(rows).all()[::-1]
    ]
