"""The ledger as it is shown, and checked."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import func, select

from service.application.served_model import resident
from service.application.validation import check_version
from service.db.database import Database
from service.db.models import Attestation, LedgerEntry
from service.jobs.views import Resource
from service.kit.pagination import check_limit, cursor_after, read_cursor
from service.ledger import ledger
from service.ledger.verify import verify


class Ledger:
    """What was done to the model, in order."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def head(self) -> int:
        with self.database.read() as session:
            return ledger.head(session, resident(session).fingerprint)

    def page(
        self,
        cursor: str | None = None,
        limit: int = 50,
        version: int | None = None,
        newest_first: bool = False,
    ) -> Resource:
        """{"items": entries, oldest first or newest first, "next", "head"}; with `version` only those up to that version."""
        check_limit(limit)
        last = read_cursor(cursor, int)
        with self.database.read() as session:
            model = resident(session)
            if version is not None:
                check_version(ledger.head(session, model.fingerprint), version)
            if newest_first:
                before = version + 1 if last is None and version is not None else last
                found = ledger.newest(session, model.fingerprint, before, limit + 1)
            else:
                found = ledger.entries(session, model.fingerprint, last or 0, version, limit + 1)
            items = [entry.as_dict() for entry in found[:limit]]
            more = cursor_after(found[limit - 1].version) if len(found) > limit else None
            return {"items": items, "next": more, "head": ledger.head(session, model.fingerprint)}

    def verify(self) -> Resource:
        """Check the hash chain, the factors, the statuses and what the replicas say of their weights."""
        with self.database.read(long=True) as session:
            model = resident(session).fingerprint
            findings = [asdict(finding) for finding in verify(session, model)]
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
                        "at": ledger.moment(r.at),
                        "withdrawn": ledger.moment(r.withdrawn) if r.withdrawn else None,
                    }
                    for r in session.scalars(rows.order_by(Attestation.version, Attestation.worker))
                ],
            }
