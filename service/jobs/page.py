"""Pages of jobs. A page ends at a number of jobs, or at a size: a job can be a megabyte."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, literal
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.db.models import Job

MAX_PAGE_SIZE = 2_000_000  #: characters of a page; one job is always in it
_ROWS_AT_ONCE = 10  # that are read beyond the end of a page, at most


def read_page(
    session: Session, query: Select[Job], limit: int, columns: tuple[InstrumentedAttribute[Any], ...]
) -> tuple[list[Job], bool]:
    """Return the first jobs of a query, at most `limit`, and whether there are more.

    `columns` are the columns with JSON that an item of the page shows.
    """
    size = sum((func.coalesce(func.length(column), 0) for column in columns), start=literal(0))
    rows = session.execute(
        query.add_columns(size).limit(limit + 1).execution_options(yield_per=_ROWS_AT_ONCE)
    )
    jobs: list[Job] = []
    total = 0
    with rows:
        for job, characters in rows:
            total += characters
            if len(jobs) == limit or (jobs and total > MAX_PAGE_SIZE):
                return jobs, True
            jobs.append(job)
    return jobs, False
