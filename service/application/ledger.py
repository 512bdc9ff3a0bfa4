"""The ledger: list its entries and verify it."""

from __future__ import annotations

import threading
from dataclasses import asdict

from sqlalchemy import func, select

from service.application.served_model import get_served_model
from service.db.database import Database
from service.db.models import Attestation, LedgerEntry
from service.jobs.views import ResourceDict
from service.kit.pagination import decode_cursor, encode_cursor, validate_limit
from service.kit.versions import resolve_version
from service.ledger import ledger
from service.ledger.verify import VerifiedStates, verify_ledger


class LedgerService:
    """Reads the ledger of the served model."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._verification = threading.Lock()
        self._verified: VerifiedStates = {}

    def head(self) -> int:
        with self.database.read_session() as session:
            return ledger.head(session, get_served_model(session).fingerprint)

    def page(
        self,
        cursor: str | None = None,
        limit: int = 50,
        version: int | None = None,
        newest_first: bool = False,
    ) -> ResourceDict:
        """Return {"items": entries, "next": cursor or None, "head"}; with `version` only entries up to it."""
        validate_limit(limit)
        last_version = decode_cursor(cursor, int)
        with self.database.read_session() as session:
            model = get_served_model(session)
            if version is not None:
                resolve_version(version, ledger.head(session, model.fingerprint))
            if newest_first:
                before = version + 1 if last_version is None and version is not None else last_version
                page_entries = ledger.newest_entries(session, model.fingerprint, before, limit + 1)
            else:
                page_entries = ledger.entries(
                    session, model.fingerprint, last_version or 0, version, limit + 1
                )
            items = [entry.as_dict() for entry in page_entries[:limit]]
            next_cursor = (
                encode_cursor(page_entries[limit - 1].version) if len(page_entries) > limit else None
            )
            return {"items": items, "next": next_cursor, "head": ledger.head(session, model.fingerprint)}

    def verify(self) -> ResourceDict:
        """Verify the hash chain, the factors, the statuses of edits and the weight digests of the workers.

        Verifications of a process run one after another, so that they never hold more than one connection.
        """
        with self._verification, self.database.read_session(no_idle_timeout=True) as session:
            model = get_served_model(session).fingerprint
            findings = [asdict(finding) for finding in verify_ledger(session, model, self._verified)]
            rows = select(Attestation).where(Attestation.model == model)
            count = select(func.count()).where(LedgerEntry.model == model)
            return {
                "ok": not findings,
                "findings": findings,
                "entries": session.scalar(count),
                "head": ledger.head(session, model),
                "replicas": [
                    {
                        "worker": r.worker,
                        "version": r.version,
                        "digest": r.digest,
                        "device": r.device,
                        "at": ledger.iso_utc(r.at),
                        "withdrawn": ledger.iso_utc(r.withdrawn) if r.withdrawn else None,
                    }
                    for r in session.scalars(rows.order_by(Attestation.version, Attestation.worker))
                ],
            }
