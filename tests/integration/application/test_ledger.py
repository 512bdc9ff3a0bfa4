"""Pages and verification of the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import update

from service.application import Services
from service.db.database import Database
from service.db.models import LedgerEntry
from tests.support.ledger_tampering import drop_append_only_guards
from tests.support.workers import WorkerParts


class TestLedger:
    def test_ledger_pages(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """The ledger is paged oldest first; `version` limits it to the entries up to that version."""
        for n in range(5):
            applied_edit(f"Tower {n}")
        first = services.ledger.page(limit=3)
        rest = services.ledger.page(cursor=first["next"], limit=3)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [1, 2, 3, 4, 5]
        assert (rest["next"], rest["head"]) == (None, 5)
        assert [entry["version"] for entry in services.ledger.page(version=2)["items"]] == [1, 2]

    def test_newest_first(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """Newest first, the ledger has the same entries in reverse order, and `version` has the same
        effect."""
        for n in range(5):
            applied_edit(f"Tower {n}")
        first = services.ledger.page(limit=3, newest_first=True)
        rest = services.ledger.page(cursor=first["next"], limit=3, newest_first=True)
        assert [entry["version"] for entry in first["items"] + rest["items"]] == [5, 4, 3, 2, 1]
        assert rest["next"] is None
        cut = services.ledger.page(version=2, limit=1, newest_first=True)
        rest = services.ledger.page(cursor=cut["next"], version=2, newest_first=True)
        assert [entry["version"] for entry in cut["items"] + rest["items"]] == [2, 1]

    def test_verify(self, services: Services, applied_edit: Callable[..., Any], worker: WorkerParts) -> None:
        """A verification has the number of entries, the head and the attestations of the replicas."""
        applied_edit()
        worker.session.attest(1, "digest")
        verification = services.ledger.verify()
        assert (
            verification["ok"],
            verification["findings"],
            verification["entries"],
            verification["head"],
        ) == (True, [], 1, 1)
        assert [(r["worker"], r["version"], r["digest"]) for r in verification["replicas"]] == [
            ("worker-1", 1, "digest")
        ]

    def test_tampered(self, services: Services, applied_edit: Callable[..., Any], database: Database) -> None:
        """The verification of a modified ledger fails with the place and version of the change."""
        applied_edit()
        with database.write_session() as session:
            drop_append_only_guards(session)
            session.execute(update(LedgerEntry).values(actor="nobody"))
        verification = services.ledger.verify()
        assert not verification["ok"]
        assert (verification["findings"][0]["where"], verification["findings"][0]["version"]) == ("chain", 1)
