"""The append-only list of what was applied and reverted, one per model, chained by hashes.

A version is a position in it and a pure function of the base weights and the edits active there. Functions on a
session do no more than read or add rows: whoever calls them owns the transaction. Whoever appends holds `lock`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import Session

from service.db.models import Job, LedgerEntry, Model, StoredFactors, now, to_json_value
from service.kit.text import fact_key

APPLY, REVERT = "apply", "revert"
GENESIS_HASH = "0" * 64  #: what the first entry names as its previous hash


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. The `body` of an apply holds all that is needed to compute the edit again."""

    model: str
    version: int
    kind: str
    edit_id: str
    actor: str
    at: datetime
    body: dict[str, Any]
    state: str  #: names the weights of this version: see `state_of`
    previous: str
    hash: str

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON says it."""
        return {**asdict(self), "at": iso_utc(self.at)}


ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


def iso_utc(time: datetime) -> str:
    """A time as ISO 8601 in UTC, always with microseconds, so that one time has one spelling."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: one value has one spelling."""
    return json.dumps(to_json_value(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def chain_hash(previous: str, entry: Entry) -> str:
    """sha256 over the hash before and everything that the entry says, but the two hashes themselves."""
    hashed_fields = {k: v for k, v in entry.as_dict().items() if k not in ("previous", "hash")}
    return hashlib.sha256(previous.encode() + canonical_json(hashed_fields)).hexdigest()


def state_hash(fingerprint: str, active_entries: Iterable[Entry]) -> str:
    """What a version's weights are a function of: the base model, and each active edit's factors and strength."""
    edits = [[e.body.get("factors_sha256"), e.body.get("strength")] for e in active_entries]
    return hashlib.sha256(canonical_json([fingerprint, edits])).hexdigest()


# reading


def head(session: Session | Connection, model: str) -> int:
    """The newest version; 0 is the base model."""
    newest_version = session.scalar(select(func.max(LedgerEntry.version)).where(LedgerEntry.model == model))
    return newest_version or 0


def entries(
    session: Session, model: str, after: int = 0, up_to: int | None = None, limit: int | None = None
) -> list[Entry]:
    """Entries with after < version <= up_to, oldest first."""
    query = select(LedgerEntry).where(LedgerEntry.model == model, LedgerEntry.version > after)
    if up_to is not None:
        query = query.where(LedgerEntry.version <= up_to)
    return [_entry(row) for row in session.scalars(query.order_by(LedgerEntry.version).limit(limit))]


def newest_entries(
    session: Session, model: str, before: int | None = None, limit: int | None = None
) -> list[Entry]:
    """Entries with version < before, newest first."""
    query = select(LedgerEntry).where(LedgerEntry.model == model)
    if before is not None:
        query = query.where(LedgerEntry.version < before)
    return [_entry(row) for row in session.scalars(query.order_by(LedgerEntry.version.desc()).limit(limit))]


def _entry(row: LedgerEntry) -> Entry:
    return Entry(**{name: getattr(row, name) for name in ENTRY_FIELDS})


def active_entries(entries: Sequence[Entry], version: int | None = None) -> list[Entry]:
    """The apply entries of the edits active at a version (the newest when None), in canonical order: by edit id.

    Active is what is applied and not reverted; of several edits of one fact only the one applied last; and none that another, which
    is not reverted, names as superseded, because it says the same relation in other words. Either way an edit comes back
    when whatever stood in its place is reverted, and only then.
    """
    entries_to_version = [e for e in entries if version is None or e.version <= version]
    reverted = {e.edit_id for e in entries_to_version if e.kind == REVERT}
    applied = [e for e in entries_to_version if e.kind == APPLY and e.edit_id not in reverted]
    newest_by_fact = {fact_key(e.body["subject"], e.body["prompt"]): e for e in applied}
    superseded = {edit for e in applied for edit in e.body.get("supersedes", ())}
    return sorted(
        (e for e in newest_by_fact.values() if e.edit_id not in superseded), key=lambda e: e.edit_id
    )


def active_edit_ids(entries: Sequence[Entry], version: int | None = None) -> list[str]:
    """Ids of the edits active at a version, in canonical order."""
    return [e.edit_id for e in active_entries(entries, version)]


# writing


def lock_ledger(session: Session, model: str) -> int:
    """Keep all others from appending until this transaction ends. Returns the head.

    `key_share`: rows that refer to the model may be added meanwhile, so nobody waits who only queues a job.
    """
    row = select(Model.fingerprint).where(Model.fingerprint == model)
    session.execute(row.with_for_update(key_share=True))
    return head(session, model)


def append_entry(
    session: Session, model: str, kind: str, edit: Job, actor: str, body: dict[str, Any]
) -> Entry:
    """Add the next version, and keep the statuses of all edits of this subject true. The caller holds the `lock`."""
    previous_entries = entries(session, model)
    body = json.loads(canonical_json(body))
    previous, version = (
        (previous_entries[-1].hash, previous_entries[-1].version + 1)
        if previous_entries
        else (GENESIS_HASH, 1)
    )
    draft = Entry(model, version, kind, edit.id, actor, now(), body, "", previous, "")
    active_after = active_entries([*previous_entries, draft])
    draft = replace(draft, state=state_hash(model, active_after))
    entry = replace(draft, hash=chain_hash(previous, draft))
    session.add(LedgerEntry(**{name: getattr(entry, name) for name in ENTRY_FIELDS}))
    if kind == APPLY:
        edit.version = version
    else:
        edit.reverted_version = version
    session.flush()
    update_statuses(session, edit, {e.edit_id for e in active_after})
    return entry


def update_statuses(session: Session, edit: Job, active_ids: set[str]) -> None:
    """Statuses of all landed edits of one subject: reverted, or applied for those that stand, or superseded."""
    committed = select(Job).where(
        Job.model == edit.model,
        Job.kind == edit.kind,
        Job.subject == edit.subject,
        Job.version.is_not(None),
    )
    for job in session.scalars(committed):
        status = "applied" if job.id in active_ids else "superseded"
        if job.reverted_version is not None:
            status = "reverted"
        if job.status != status:
            job.status, job.updated = status, now()


def factors_of(session: Session, edits: Sequence[str]) -> dict[str, bytes]:
    """The factors of these edits, by id."""
    query = select(StoredFactors.edit_id, StoredFactors.data).where(StoredFactors.edit_id.in_(edits))
    return {row.edit_id: row.data for row in session.execute(query)}
