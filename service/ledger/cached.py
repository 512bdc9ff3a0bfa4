"""Read access to one model's ledger for a worker, with the entries cached in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.db.database import Database
from service.errors import NotFound
from service.ledger import ledger


class CachedLedger:
    """The ledger of one model. Entries never change, so each is read once. Thread-safe."""

    def __init__(self, database: Database, model_fingerprint: str) -> None:
        self.database = database
        self.model = model_fingerprint
        self._entries: list[ledger.Entry] = []  # the oldest entries, without gaps

    def head(self) -> int:
        """Return the newest version; 0 is the base model."""
        with self.database.autocommit_read() as connection:
            return ledger.head(connection, self.model)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        """Return (edit id, body of its entry) of the edits active at a version, in canonical order.

        Raises NotFound for a version that does not exist.
        """
        with self.database.read_session() as session:
            entries = self._load_entries(session)
        if not 0 <= version <= len(entries):
            raise NotFound(f"there is no version {version}.")
        return [(e.edit_id, e.body) for e in ledger.active_entries(entries, version)]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        """Return the serialized factors of these edits, by edit id."""
        with self.database.read_session() as session:
            return ledger.factors_of(session, edits)

    def _load_entries(self, session: Session) -> list[ledger.Entry]:
        """Return all entries, reading only those that are not cached.

        The last cached entry is read again: when it differs, a backup was restored and the whole ledger is read.
        """
        cached = self._entries
        new = ledger.entries(session, self.model, after=max(0, len(cached) - 1))
        if cached and (not new or new[0].hash != cached[-1].hash):
            cached, new = [], ledger.entries(session, self.model)
        self._entries = [*cached[:-1], *new]
        return self._entries
