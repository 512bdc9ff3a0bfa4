"""Read access to one model's ledger for a worker, with a cache that is bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.db.database import Database
from service.errors import NotFound
from service.ledger import ledger

MAX_BODY_BYTES = 64 * 2**20  #: JSON bytes of the entry bodies that are cached
PAGE_SIZE = 500  #: rows that one statement reads at most


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The fields of an entry that decide which edits are active, about 500 bytes."""

    version: int
    kind: str
    edit_id: str
    hash: str
    fact: str
    supersedes: tuple[str, ...]


class CachedLedger:
    """The ledger of one model. Thread-safe.

    Entries never change. The index of all entries stays in memory. Their bodies are cached up to `max_body_bytes` of
    JSON, least recently used first out, and are read again when they are needed.
    """

    def __init__(
        self, database: Database, model_fingerprint: str, max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.database = database
        self.model = model_fingerprint
        self.max_body_bytes = max_body_bytes
        self._lock = threading.Lock()
        self._index: list[IndexEntry] = []  # the oldest entries, without gaps
        self._bodies: OrderedDict[str, tuple[dict[str, Any], int]] = OrderedDict()  # edit id -> (body, bytes)
        self._body_bytes = 0

    def head(self) -> int:
        """Return the newest version; 0 is the base model."""
        with self.database.autocommit_read() as connection:
            return ledger.head(connection, self.model)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        """Return (edit id, body of its entry) of the edits active at a version, in canonical order.

        Raises NotFound for a version that does not exist.
        """
        with self._lock, self.database.read_session() as session:
            self._update_index(session)
            if not 0 <= version <= len(self._index):
                raise NotFound(f"there is no version {version}.")
            active = [entry.edit_id for entry in ledger.active_entries(self._index, version)]
            bodies = self._load_bodies(session, active)
        return [(edit, bodies[edit]) for edit in active]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        """Return the serialized factors of these edits, by edit id."""
        with self.database.read_session() as session:
            return ledger.factors_of(session, edits)

    def gate_space(self, digest: str) -> bytes:
        """Return the serialized gate space with this digest."""
        with self.database.read_session() as session:
            return ledger.gate_space(session, digest)

    def _update_index(self, session: Session) -> None:
        """Add the entries that are not in the index.

        The newest indexed entry is read again: when it differs, a backup was restored and the whole ledger is read.
        """
        after = max(0, len(self._index) - 1)
        page = ledger.entries(session, self.model, after=after, limit=PAGE_SIZE)
        if self._index and (not page or page[0].hash != self._index[-1].hash):
            self._index, self._bodies, self._body_bytes = [], OrderedDict(), 0
            page = ledger.entries(session, self.model, limit=PAGE_SIZE)
        elif self._index:
            page_is_full, page = len(page) == PAGE_SIZE, page[1:]
            self._add(page)
            if not page_is_full:
                return
            page = ledger.entries(session, self.model, after=len(self._index), limit=PAGE_SIZE)
        while page:
            self._add(page)
            if len(page) < PAGE_SIZE:
                return
            page = ledger.entries(session, self.model, after=len(self._index), limit=PAGE_SIZE)

    def _add(self, entries: Sequence[ledger.Entry]) -> None:
        for e in entries:
            is_apply = e.kind == ledger.APPLY
            fact, supersedes = (e.fact, tuple(e.supersedes)) if is_apply else ("", ())
            self._index.append(IndexEntry(e.version, e.kind, e.edit_id, e.hash, fact, supersedes))
            if is_apply:
                self._cache_body(e.edit_id, e.body)

    def _load_bodies(self, session: Session, edits: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the bodies of edits, and cache the last of them."""
        bodies = {}
        for edit in edits:
            if edit in self._bodies:
                self._bodies.move_to_end(edit)
                bodies[edit] = self._bodies[edit][0]
        missing = [edit for edit in edits if edit not in bodies]
        for start in range(0, len(missing), PAGE_SIZE):
            for edit, body in ledger.bodies_of(
                session, self.model, missing[start : start + PAGE_SIZE]
            ).items():
                bodies[edit] = body
                self._cache_body(edit, body)
        return bodies

    def _cache_body(self, edit: str, body: dict[str, Any]) -> None:
        size = len(ledger.canonical_json(body))
        self._bodies[edit] = (body, size)
        self._body_bytes += size
        while self._body_bytes > self.max_body_bytes:
            _, (_, dropped) = self._bodies.popitem(last=False)
            self._body_bytes -= dropped
