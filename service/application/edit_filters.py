"""Filters of the list of edits: by status, caller, subject, batch and time, and by words of the edit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import ColumnElement

from service.db.models import Job
from service.errors import InvalidInput
from service.jobs.views import EDIT_STATUSES
from service.kit.search_text import search_words
from service.kit.text import normalize_whitespace


@dataclass(frozen=True)
class EditFilters:
    """Which edits a list has; None does not filter."""

    status: str | None = None
    subject: str | None = None  #: exactly, up to white space
    actor: str | None = None
    batch: str | None = None
    search: str | None = None  #: words that are in the subject, the prompt or the objects
    since: str | None = None  #: time or day in ISO 8601 at or after which an edit was created
    until: str | None = None  #: time before which, or day up to whose end, an edit was created

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on the rows. Raises InvalidInput for a value that is not possible."""
        return list(self._conditions())

    def _conditions(self) -> Iterator[ColumnElement[bool]]:
        if self.status is not None:
            if self.status not in EDIT_STATUSES:
                raise InvalidInput(f"`status` must be one of {', '.join(EDIT_STATUSES)}.", "status")
            yield Job.status == self.status
        if self.subject is not None:
            yield Job.subject == normalize_whitespace(self.subject)
        if self.actor is not None:
            yield Job.actor == self.actor
        if self.batch is not None:
            yield Job.batch == self.batch
        if self.since is not None:
            yield Job.created >= parse_time(self.since, "since")
        if self.until is not None:
            yield Job.created < parse_time(self.until, "until", end_of_day=True)
        for word in search_words(self.search or ""):
            yield Job.search_text.contains(word, autoescape=True)


def parse_time(text: str, field: str, end_of_day: bool = False) -> datetime:
    """Return a time in ISO 8601, in UTC unless it has a zone; of a day its beginning, or its end."""
    try:
        if len(text) <= len("2026-12-01"):
            day = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
            return day + timedelta(days=1) if end_of_day else day
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"`{field}` must be a day or a time in ISO 8601, such as 2026-12-01 or 2026-12-01T09:30:00Z.",
            field,
        ) from None
