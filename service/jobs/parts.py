"""What is kept of a job while it is open: what it needs beside its request, and what it has found so far.

So a row of `jobs` stays small, and a job whose worker died is not begun from nothing.
"""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.orm import Session

from service.store.tables import Job, Part

#: the kinds of job that have parts
KINDS = ("evaluation",)
RECORDS = "records"  #: of an evaluation: the records that came with its request, as JSON


def put(session: Session, job_id: str, name: str, data: bytes) -> None:
    """Keep a part, in place of what had its name before."""
    session.merge(Part(job_id=job_id, name=name, data=data))


def get(session: Session, job_id: str, name: str) -> bytes | None:
    part = session.get(Part, (job_id, name))
    return None if part is None else part.data


def drop(session: Session, job: Job) -> None:
    """Nothing is kept of a job that has ended, unless it failed: then it may be tried again, and goes on with them."""
    if job.kind in KINDS and job.status != "failed":
        session.execute(delete(Part).where(Part.job_id == job.id))
