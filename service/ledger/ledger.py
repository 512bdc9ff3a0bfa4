"""The append-only ledger of one model: every applied and every reverted edit, chained by hashes.

A version is a position in the ledger. It is a pure function of the base weights and of the edits active there. The
functions read or add rows within the caller's transaction. A caller that appends holds the ledger's lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, func, insert, select
from sqlalchemy.orm import Session, defer

from service.db.models import (
    Job,
    LedgerEntry,
    LedgerHead,
    Model,
    StoredFactors,
    StoredGateSpace,
    now,
    to_json_value,
)
from service.errors import NotFound
from service.kit.stated_fact import StatedFact
from service.ledger import audit
from service.ledger.audit_coverage import LEDGER

APPLY, REVERT = "apply", "revert"
GENESIS_HASH = "0" * 64  #: the previous hash of the first entry
VALUES_AT_ONCE = 500  #: subjects that one statement compares with


@dataclass(frozen=True)
class Entry:
    """One entry of the ledger. The `body` of an apply entry holds everything that reproduces the edit."""

    model: str
    version: int
    kind: str
    edit_id: str
    actor: str
    at: datetime
    body: dict[str, Any]
    state: str  #: identifies the weights of this version, see `state_hash`
    previous: str  #: hash of the previous entry
    hash: str

    @property
    def fact(self) -> str:
        """The key of the fact of an apply entry."""
        return StatedFact.from_fields(self.body).key

    @property
    def supersedes(self) -> Sequence[str]:
        """Ids of the edits that an apply entry names as superseded."""
        return tuple(self.body.get("supersedes", ()))

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return {**asdict(self), "at": iso_utc(self.at)}


class HistoryItem(Protocol):
    """The fields of an entry that decide which edits are active. `fact` and `supersedes` are read of apply entries
    only."""

    @property
    def version(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def edit_id(self) -> str: ...
    @property
    def fact(self) -> str: ...
    @property
    def supersedes(self) -> Sequence[str]: ...


HistoryItemT = TypeVar("HistoryItemT", bound=HistoryItem)

#: the active edits of a version: edit id -> (sha256 of its factors, its strength)
ActiveEdits = Mapping[str, Sequence[Any]]

ENTRY_FIELDS = tuple(field.name for field in fields(Entry))


def iso_utc(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with microseconds. Equal times give equal strings."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces. Equal values give equal bytes."""
    return json.dumps(to_json_value(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def chain_hash(previous: str, entry: Entry) -> str:
    """Return sha256 over the previous hash and all fields of the entry except its two hashes."""
    hashed_fields = {k: v for k, v in entry.as_dict().items() if k not in ("previous", "hash")}
    return hashlib.sha256(previous.encode() + canonical_json(hashed_fields)).hexdigest()


def state_hash(fingerprint: str, active_entries: Iterable[Entry]) -> str:
    """Return the hash of everything that determines a version's weights.

    These are the base model's fingerprint and the factors and the strength of each active edit, in canonical order.
    """
    return hash_encoded_state(fingerprint, (canonical_json(weights_key(e)) for e in active_entries))


def weights_key(entry: Entry) -> list[Any]:
    """Return what an active edit contributes to the state of a version."""
    return [entry.body.get("factors_sha256"), entry.body.get("strength")]


def hash_encoded_state(fingerprint: str, encoded: Iterable[bytes]) -> str:
    """Return the state hash of a version whose edits are given as the JSON of what each contributes."""
    beginning = canonical_json([fingerprint])[:-1] + b",["
    return hashlib.sha256(beginning + b",".join(encoded) + b"]]").hexdigest()


# reading


def head(session: Session | Connection, model: str) -> int:
    """Return the newest version; 0 is the base model."""
    newest_version = session.scalar(select(func.max(LedgerEntry.version)).where(LedgerEntry.model == model))
    return newest_version or 0


def entries(
    session: Session, model: str, after: int = 0, up_to: int | None = None, limit: int | None = None
) -> list[Entry]:
    """Return the entries with after < version <= up_to, oldest first."""
    query = select(LedgerEntry).where(LedgerEntry.model == model, LedgerEntry.version > after)
    if up_to is not None:
        query = query.where(LedgerEntry.version <= up_to)
    return [_entry(row) for row in session.scalars(query.order_by(LedgerEntry.version).limit(limit))]


def newest_entries(
    session: Session, model: str, before: int | None = None, limit: int | None = None
) -> list[Entry]:
    """Return the entries with version < before, newest first."""
    query = select(LedgerEntry).where(LedgerEntry.model == model)
    if before is not None:
        query = query.where(LedgerEntry.version < before)
    return [_entry(row) for row in session.scalars(query.order_by(LedgerEntry.version.desc()).limit(limit))]


def _entry(row: LedgerEntry) -> Entry:
    return Entry(**{name: getattr(row, name) for name in ENTRY_FIELDS})


def active_entries(entries: Sequence[HistoryItemT], version: int | None = None) -> list[HistoryItemT]:
    """Return the apply entries of the edits active at a version (the newest when None), in canonical order: by edit id.

    An edit is active when it is applied and not reverted, when it is the newest such edit of its fact, and when no
    edit that is not reverted names it as superseded. A superseded edit becomes active again when all edits that
    supersede it are reverted.
    """
    entries_to_version = [e for e in entries if version is None or e.version <= version]
    reverted = {e.edit_id for e in entries_to_version if e.kind == REVERT}
    applied = [e for e in entries_to_version if e.kind == APPLY and e.edit_id not in reverted]
    newest_by_fact = {e.fact: e for e in applied}
    superseded = {edit for e in applied for edit in e.supersedes}
    return sorted(
        (e for e in newest_by_fact.values() if e.edit_id not in superseded), key=lambda e: e.edit_id
    )


def active_edit_ids(entries: Sequence[Entry], version: int | None = None) -> list[str]:
    """Return the ids of the edits active at a version, in canonical order."""
    return [e.edit_id for e in active_entries(entries, version)]


# writing


def lock_ledger(session: Session, model: str) -> int:
    """Lock the ledger against other appends until the transaction ends, and return the head.

    The lock is FOR NO KEY UPDATE: rows that refer to the model can be inserted meanwhile, so it does not block
    submissions of jobs.
    """
    row = select(Model.fingerprint).where(Model.fingerprint == model)
    session.execute(row.with_for_update(key_share=True))
    return head(session, model)


def append_entry(
    session: Session, model: str, kind: str, edit: Job, actor: str, body: dict[str, Any]
) -> Entry:
    """Add the next version and update the statuses of the edits of its subject. The caller holds the lock."""
    return append_entries(session, model, kind, [(edit, body)], actor)[0]


def append_entries(
    session: Session, model: str, kind: str, edits: Sequence[tuple[Job, dict[str, Any]]], actor: str
) -> list[Entry]:
    """Add a version for each edit and its body, in this order, and update the statuses of the edits of their subjects.
    The caller holds the lock.

    Whether an edit is active depends on the entries of its subject alone. So this reads the newest entry, the row of
    `ledger_heads`, and the entries of these subjects, however long the ledger is.
    """
    newest = next(iter(newest_entries(session, model, limit=1)), None)
    head_row = session.get(LedgerHead, model, populate_existing=True)
    active = dict(_active_at_head(session, model, newest, head_row))
    encoded = {edit_id: canonical_json(key) for edit_id, key in active.items()}
    of_subject = entries_by_subject(session, model, {edit.subject for edit, _ in edits})
    previous, version = (newest.hash, newest.version) if newest else (GENESIS_HASH, 0)
    appended: list[Entry] = []
    for edit, body in edits:
        version, subject_entries = version + 1, of_subject[edit.subject]
        draft = Entry(
            model, version, kind, edit.id, actor, now(), json.loads(canonical_json(body)), "", previous, ""
        )
        for entry in subject_entries:
            active.pop(entry.edit_id, None)
        subject_entries.append(draft)
        changed = {e.edit_id: weights_key(e) for e in active_entries(subject_entries)}
        active |= changed
        encoded |= {edit_id: canonical_json(key) for edit_id, key in changed.items()}
        draft = replace(
            draft, state=hash_encoded_state(model, (encoded[edit_id] for edit_id in sorted(active)))
        )
        entry = replace(draft, hash=chain_hash(previous, draft))
        session.add(LedgerEntry(**{name: getattr(entry, name) for name in ENTRY_FIELDS}))
        if kind == APPLY:
            edit.version = version
        else:
            edit.reverted_version = version
        appended.append(entry)
        previous = entry.hash
    session.merge(LedgerHead(model=model, version=version, hash=previous, active=active))
    session.flush()
    _update_statuses(session, model, list(of_subject), active.keys())
    head_fields = {"model": model, "version": version, "hash": previous}
    audit.append(session, LEDGER, [(model, entry.version) for entry in appended], head_fields)
    return appended


def active_edits(entries: Sequence[Entry]) -> ActiveEdits:
    """Return the active edits after these entries, as the row of `ledger_heads` stores them."""
    return {e.edit_id: weights_key(e) for e in active_entries(entries)}


def _active_at_head(
    session: Session, model: str, newest: Entry | None, head_row: LedgerHead | None
) -> ActiveEdits:
    """Return the active edits at the head: from its row, or from the whole ledger when that row is not the head's."""
    if newest is None:
        return {}
    if head_row is not None and (head_row.version, head_row.hash) == (newest.version, newest.hash):
        return head_row.active
    return active_edits(entries(session, model))


def entries_by_subject(
    session: Session, model: str, subjects: Collection[str], up_to: int | None = None
) -> dict[str, list[Entry]]:
    """Return the entries of all edits of each subject with version <= up_to, oldest first."""
    found: dict[str, list[Entry]] = {subject: [] for subject in subjects}
    for some in _portions(list(subjects)):
        query = (
            select(LedgerEntry, Job.subject)
            .join(Job, Job.id == LedgerEntry.edit_id)
            .where(LedgerEntry.model == model, Job.model == model, Job.subject.in_(some))
        )
        if up_to is not None:
            query = query.where(LedgerEntry.version <= up_to)
        for row, subject in session.execute(query.order_by(LedgerEntry.version)):
            found[subject].append(_entry(row))
    return found


def _update_statuses(
    session: Session, model: str, subjects: Sequence[str], active_ids: Collection[str]
) -> None:
    """Set the statuses of all committed edits of these subjects: reverted, applied if active, or superseded."""
    for some in _portions(subjects):
        committed = select(Job).where(
            Job.model == model, Job.kind == "edit", Job.subject.in_(some), Job.version.is_not(None)
        )
        for job in session.scalars(committed.options(defer(Job.request), defer(Job.result))):
            status = "applied" if job.id in active_ids else "superseded"
            if job.reverted_version is not None:
                status = "reverted"
            if job.status != status:
                job.status, job.updated = status, now()


def _portions(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield values in portions that one statement can have as parameters."""
    for start in range(0, len(values), VALUES_AT_ONCE):
        yield values[start : start + VALUES_AT_ONCE]


def factors_of(session: Session, edits: Sequence[str]) -> dict[str, bytes]:
    """Return the serialized factors of these edits, by edit id."""
    query = select(StoredFactors.edit_id, StoredFactors.data).where(StoredFactors.edit_id.in_(edits))
    return {row.edit_id: row.data for row in session.execute(query)}


def gate_space(session: Session, digest: str) -> bytes:
    """Return the serialized gate space with this digest. Raise NotFound if there is none."""
    data = session.scalar(select(StoredGateSpace.data).where(StoredGateSpace.digest == digest))
    if data is None:
        raise NotFound(f"the gate space {digest} is not in the database.")
    return data


def gate_space_size(session: Session, digest: str) -> int:
    """Return the number of bytes of a serialized gate space. Raise NotFound if there is none."""
    size: int | None = session.scalar(
        select(func.length(StoredGateSpace.data)).where(StoredGateSpace.digest == digest)
    )
    if size is None:
        raise NotFound(f"the gate space {digest} is not in the database.")
    return size


def put_gate_space(session: Session, digest: str, data: bytes) -> None:
    """Store a gate space unless it is stored. The session does not keep its bytes."""
    if not has_gate_space(session, digest):
        session.execute(insert(StoredGateSpace), {"digest": digest, "data": data})


def has_gate_space(session: Session, digest: str) -> bool:
    """Return whether a gate space is stored, without reading it."""
    return session.scalar(select(StoredGateSpace.digest).where(StoredGateSpace.digest == digest)) is not None


def bodies_of(session: Session, model: str, edits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the bodies of the apply entries of these edits, by edit id."""
    query = select(LedgerEntry.edit_id, LedgerEntry.body).where(
        LedgerEntry.model == model, LedgerEntry.kind == APPLY, LedgerEntry.edit_id.in_(edits)
    )
    return {row.edit_id: row.body for row in session.execute(query)}
