"""The ledger as it is read, and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import update

from service.application import Operations
from service.db.database import Database
from service.db.models import LedgerEntry
from service.jobs.job_store import Desk
from tests.support.ledger_tampering import unguard


class TestLedger:
    def test_ledger_pages(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """The ledger is paged oldest first, and up to a version."""
        for n in range(5):
            landed(f"Tower {n}")
        first = operations.ledger.page(limit=3)
        rest = operations.ledger.page(cursor=first["next"], limit=3)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [1, 2, 3, 4, 5]
        assert (rest["next"], rest["head"]) == (None, 5)
        assert [entry["version"] for entry in operations.ledger.page(version=2)["items"]] == [1, 2]

    def test_the_ledger_turned_round(self, operations: Operations, landed: Callable[..., Any]) -> None:
        """Newest first, the ledger has the same entries and pages, and `version` cuts the same ones off."""
        for n in range(5):
            landed(f"Tower {n}")
        first = operations.ledger.page(limit=3, newest_first=True)
        rest = operations.ledger.page(cursor=first["next"], limit=3, newest_first=True)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [5, 4, 3, 2, 1]
        assert rest["next"] is None
        cut = operations.ledger.page(version=2, limit=1, newest_first=True)
        rest = operations.ledger.page(cursor=cut["next"], version=2, newest_first=True)
        assert [entry["version"] for entry in cut["items"] + rest["items"]] == [2, 1]

    def test_verify(self, operations: Operations, landed: Callable[..., Any], desk: Desk) -> None:
        """Verifying tells the entries, the head and what the replicas said."""
        landed()
        desk.attest(1, "digest")
        found = operations.ledger.verify()
        assert (found["ok"], found["findings"], found["entries"], found["head"]) == (True, [], 1, 1)
        assert [(r["worker"], r["version"], r["digest"]) for r in found["replicas"]] == [
            ("worker-1", 1, "digest")
        ]

    def test_tampered(self, operations: Operations, landed: Callable[..., Any], database: Database) -> None:
        """Verifying a changed ledger says what is wrong, as JSON."""
        landed()
        with database.session() as session:
            unguard(session)
            session.execute(update(LedgerEntry).values(actor="nobody"))
        found = operations.ledger.verify()
        assert not found["ok"]
        assert (found["findings"][0]["where"], found["findings"][0]["version"]) == ("chain", 1)
