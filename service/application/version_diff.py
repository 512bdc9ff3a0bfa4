"""The facts that differ between two versions: what was active for each fact before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.application.served_model import get_served_model
from service.application.version_names import find_version
from service.db.database import Database
from service.db.models import Job, LedgerEntry
from service.jobs.views import ResourceDict
from service.kit.pagination import decode_cursor, encode_cursor, validate_limit
from service.ledger import ledger
from service.schemas import Version

SHOWN = (
    "subject", "prompt", "messages", "objective", "target_new", "target_true", "resolved_true", "method",
)  # fmt: skip


class VersionDiff:
    """Compares the active edits of two versions of the served model.

    Whether an edit is active depends on the entries of its subject alone, so only subjects with an entry between the
    two versions are read.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def page(
        self, before: Version, after: Version, cursor: str | None = None, limit: int = 50
    ) -> ResourceDict:
        """Return {"before", "after": numbers, "items": facts that differ, "next": cursor or None}.

        A page has the facts of up to `limit` subjects, in the order in which the ledger first changes them.
        """
        validate_limit(limit)
        passed = decode_cursor(cursor, int) or 0
        with self.database.read_session() as session:
            model = get_served_model(session)
            a, b = (
                find_version(session, model, before, "before"),
                find_version(session, model, after, "after"),
            )
            subjects = _changed_subjects(session, model.fingerprint, sorted((a, b)), passed, limit + 1)
            page = dict(subjects[:limit])
            entries = ledger.entries_by_subject(session, model.fingerprint, page, max(a, b))
            items = [
                change
                for subject in page
                for change in _changes(entries[subject], a, b)
            ]  # fmt: skip
            next_cursor = encode_cursor(subjects[limit - 1][1]) if len(subjects) > limit else None
            return {"before": a, "after": b, "items": items, "next": next_cursor}


def _changed_subjects(
    session: Session, model: str, versions: Sequence[int], passed: int, limit: int
) -> list[tuple[str, int]]:
    """Return the subjects with entries between two versions, each with the first of these, after the entry `passed`."""
    low, high = versions
    first = func.min(LedgerEntry.version)
    query = (
        select(Job.subject, first)
        .join(LedgerEntry, LedgerEntry.edit_id == Job.id)
        .where(
            LedgerEntry.model == model,
            Job.model == model,
            LedgerEntry.version > low,
            LedgerEntry.version <= high,
        )
        .group_by(Job.subject)
        .having(first > passed)
    )
    return [(subject, number) for subject, number in session.execute(query.order_by(first).limit(limit))]


def _changes(entries: Sequence[ledger.Entry], a: int, b: int) -> Iterator[ResourceDict]:
    """Yield the facts of one subject whose active edit differs between two versions."""
    active_before, active_after = (
        {entry.fact: entry for entry in ledger.active_entries(entries, version)} for version in (a, b)
    )
    for fact in dict.fromkeys((*active_before, *active_after)):
        before, after = active_before.get(fact), active_after.get(fact)
        if before is None or after is None or before.edit_id != after.edit_id:
            yield {
                "change": _kind_of_change(before, after),
                **{name: (after or before or entries[0]).body.get(name) for name in SHOWN[:3]},
                "before": before and _shown(before),
                "after": after and _shown(after),
            }


def _kind_of_change(before: ledger.Entry | None, after: ledger.Entry | None) -> str:
    if before is None:
        return "added"
    return "removed" if after is None else "replaced"


def _shown(entry: ledger.Entry) -> dict[str, Any]:
    """Return the edit of an entry as a comparison shows it."""
    return {
        "edit_id": entry.edit_id,
        "version": entry.version,
        "actor": entry.actor,
        "at": ledger.iso_utc(entry.at),
        **{name: entry.body.get(name) for name in SHOWN[3:]},
    }
