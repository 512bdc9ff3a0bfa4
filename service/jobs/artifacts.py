"""What is kept of a job while it is open: what it needs beside its request, and what it has found so far.

So a row of `jobs` stays small, and a job whose worker died is not begun from nothing. What an export makes is kept after its end,
of the newest few: it can be made again at any time.
"""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.db.models import Job, JobArtifact

#: the kinds of job that have parts while they are open
ARTIFACT_KINDS = ("edit", "evaluation", "export")
RECORDS = "records"  #: of an evaluation: the records that came with its request, as JSON
IMPORTED_FACTORS = "factors"  #: of an edit that was imported: its vectors, as they shall land
IMPORTED_BODY = "body"  #: of an edit that was imported: what the ledger that it comes from says of how it was found, as JSON
MAX_KEPT_EXPORTS = 4  #: how many ended exports are kept


def chunk_name(number: int) -> str:
    """The name of a piece of an export's file."""
    return f"file.{number:06}"


def put_artifact(session: Session, job_id: str, name: str, data: bytes) -> None:
    """Keep a part, in place of what had its name before."""
    session.merge(JobArtifact(job_id=job_id, name=name, data=data))


def get_artifact(session: Session, job_id: str, name: str) -> bytes | None:
    artifact = session.get(JobArtifact, (job_id, name))
    return None if artifact is None else artifact.data


def has_artifact(session: Session, job_id: str, name: str) -> bool:
    """Whether a part is there, without reading it."""
    return (
        session.scalar(select(JobArtifact.name).where(JobArtifact.job_id == job_id, JobArtifact.name == name))
        is not None
    )


def delete_artifacts(session: Session, job: Job) -> None:
    """Nothing is kept of a job that has ended, unless it failed: then it may be tried again, and goes on with them; or it is one of
    the newest exports."""
    if job.kind == "export" and job.status == "done":
        ended = select(Job.id).where(Job.model == job.model, Job.kind == "export", Job.status == "done")
        expired = session.scalars(
            ended.order_by(Job.ended.desc(), Job.id.desc()).offset(MAX_KEPT_EXPORTS)
        ).all()
        session.execute(delete(JobArtifact).where(JobArtifact.job_id.in_(expired)))
    elif job.kind in ARTIFACT_KINDS and job.status != "failed":
        session.execute(delete(JobArtifact).where(JobArtifact.job_id == job.id))
