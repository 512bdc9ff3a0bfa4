"""The rows that audit records cover, and their digests.

A digest covers the columns of a row that are shown, as they are stored. It begins with the number of the format, which
is the list of these columns. A list never changes: when a table gets a column, add a format with it. Older records keep
theirs, and cover the new column from the next record of the row on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, case, or_, select, true, tuple_, type_coerce
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.db.models import ApiKey, Attestation, Job, JsonText, LedgerEntry, VersionName

LEDGER, EDIT, ATTESTATION, API_KEY = "ledger", "edit", "attestation", "key"
VERSION_NAME = "version_name"
PAGE_SIZE = 1000  #: audit records that one statement reads at most
ROWS_PER_PAGE = 16  #: rows that are read at once for their digests; a job has up to a megabyte

PrimaryKey = tuple[Any, ...]
Column = ColumnElement[Any] | InstrumentedAttribute[Any]

_STILL_OPEN = Job.status.in_(("queued", "running"))


@dataclass(frozen=True, eq=False)
class Coverage:
    """The rows of a kind: their primary key, and the columns that a digest covers, by format."""

    key: tuple[InstrumentedAttribute[Any], ...]
    formats: dict[int, tuple[Column, ...]]
    condition: ColumnElement[bool]

    @property
    def newest_format(self) -> int:
        return max(self.formats)


@cache
def coverage_query(coverage: Coverage, number: int) -> Select[Any]:
    """Return the query for the keys and the columns of a format."""
    return select(*coverage.key, *map(_raw, coverage.formats[number])).where(coverage.condition)


def _raw(column: Any) -> ColumnElement[Any]:
    """Return a column with JSON as the stored text."""
    return type_coerce(column, Text()) if isinstance(column.type, JsonText) else column


def _after_end(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    """Return a column of a job that changes while the job is open: its value after the end, and NULL before."""
    return type_coerce(case((_STILL_OPEN, None), else_=_raw(column)), _raw(column).type)


#: columns of an edit that never change
_SUBMISSION = (
    Job.id, Job.kind, Job.model, Job.request, Job.actor, Job.created, Job.subject, Job.fact_key, Job.dry_run,
)  # fmt: skip
#: columns of an edit that change until it ends
_OUTCOME = (
    Job.request_id, Job.started, Job.ended, Job.attempts, Job.worker, Job.cancel_requested, Job.progress, Job.result,
    Job.error, Job.version, Job.exhausted, Job.cancelled_by,
)  # fmt: skip
#: the status of an edit follows from the ledger once it is applied
_STATUS = case((_STILL_OPEN, "open"), (Job.version.is_not(None), "applied"), else_=Job.status)
_EDIT: tuple[Column, ...] = (*_SUBMISSION, _STATUS, *map(_after_end, _OUTCOME))
_ENTRY = (
    LedgerEntry.model, LedgerEntry.version, LedgerEntry.kind, LedgerEntry.edit_id, LedgerEntry.actor, LedgerEntry.at,
    LedgerEntry.body, LedgerEntry.state, LedgerEntry.previous, LedgerEntry.hash,
)  # fmt: skip
_ATTESTATION = (
    Attestation.model, Attestation.version, Attestation.worker, Attestation.digest, Attestation.device, Attestation.at,
    Attestation.withdrawn,
)  # fmt: skip
_API_KEY = (
    ApiKey.id, ApiKey.name, ApiKey.digest, ApiKey.scopes, ApiKey.requests_per_minute, ApiKey.tokens_per_minute,
    ApiKey.max_queued, ApiKey.max_concurrent, ApiKey.weight, ApiKey.created, ApiKey.revoked,
)  # fmt: skip
_VERSION_NAME = (
    VersionName.model, VersionName.name, VersionName.version, VersionName.actor, VersionName.created,
    VersionName.deleted, VersionName.deleted_by,
)  # fmt: skip

COVERAGE: dict[str, Coverage] = {
    LEDGER: Coverage((LedgerEntry.model, LedgerEntry.version), {1: _ENTRY}, true()),
    EDIT: Coverage(
        (Job.id,),
        {1: _EDIT, 2: (*_EDIT, Job.batch, _after_end(Job.search_text))},
        or_(Job.kind == "edit", Job.id.startswith("edit_", autoescape=True)),
    ),
    ATTESTATION: Coverage(
        (Attestation.model, Attestation.version, Attestation.worker), {1: _ATTESTATION}, true()
    ),
    API_KEY: Coverage((ApiKey.id,), {1: _API_KEY}, true()),
    VERSION_NAME: Coverage((VersionName.model, VersionName.name), {1: _VERSION_NAME}, true()),
}


def subject_of(key: Sequence[Any]) -> str:
    """Return the subject of the records of a row."""
    return "/".join(map(str, key))


def format_of(digest: str) -> int:
    """Return the number of the format of a digest; 0 for a text that is not a digest."""
    number = digest.partition(":")[0]
    return int(number) if number.isdecimal() else 0


def row_digests(
    session: Session, kind: str, keys: Sequence[PrimaryKey] | None = None, format: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the subject and the digest of each row of a kind, or of those with the given primary keys.

    `format` is the newest one unless it is given.
    """
    number = format or COVERAGE[kind].newest_format
    query = coverage_query(COVERAGE[kind], number)
    if keys is None:
        yield from _digests_of(session, kind, number, query.execution_options(yield_per=ROWS_PER_PAGE))
        return
    for start in range(0, len(keys), ROWS_PER_PAGE):
        key_is_in_page = tuple_(*COVERAGE[kind].key).in_(keys[start : start + ROWS_PER_PAGE])
        yield from _digests_of(session, kind, number, query.where(key_is_in_page))


def _digests_of(session: Session, kind: str, number: int, query: Select[Any]) -> Iterator[tuple[str, str]]:
    width = len(COVERAGE[kind].key)
    for row in session.execute(query):
        digest = hashlib.sha256(canonical_values(list(row[width:]))).hexdigest()
        yield subject_of(row[:width]), f"{number}:{digest}"


def canonical_values(values: Sequence[Any]) -> bytes:
    """Return values as JSON with times in ISO 8601. Equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), default=iso_microseconds).encode()


def iso_microseconds(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with microseconds."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")
