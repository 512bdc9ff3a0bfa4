"""Times in filters of edits: service.application.edit_filters."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from service.application.edit_filters import EditFilters, parse_time
from service.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "end_of_day", "time"),
    [
        ("2026-12-01", False, datetime(2026, 12, 1, tzinfo=UTC)),
        ("2026-12-31", True, datetime(2027, 1, 1, tzinfo=UTC)),
        ("2026-12-01T09:30", True, datetime(2026, 12, 1, 9, 30, tzinfo=UTC)),
        ("2026-12-01T09:30:00Z", False, datetime(2026, 12, 1, 9, 30, tzinfo=UTC)),
        ("2026-12-01T09:30:00+02:00", False, datetime(2026, 12, 1, 7, 30, tzinfo=UTC)),
    ],
)
def test_a_time_is_read(text: str, end_of_day: bool, time: datetime) -> None:
    """A time without a zone is in UTC; a day is its beginning, or its end."""
    assert parse_time(text, "until", end_of_day) == time


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-13-01", "9999-12-31", "2026-12-01T25:00", "0001-01-01T00:00+14:00"]
)
def test_what_is_no_time(text: str) -> None:
    """A text that is no time is refused, with the name of the field and an example."""
    with pytest.raises(InvalidInput, match="such as 2026-12-01") as refused:
        EditFilters(until=text).conditions()
    assert refused.value.field == "until"
