"""Artifacts of a job: input that is too large for its row, intermediate results, and the file of an export.

A retried job resumes from its artifacts.
"""

from __future__ import annotations

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from service.db.models import Job, JobArtifact
from service.jobs.job_kinds import JOB_KINDS

RECORDS = "records"  #: of an evaluation: the records of its request, as JSON
IMPORTED_FACTORS = "factors"  #: of an imported edit: its serialized factors
IMPORTED_BODY = "body"  #: of an imported edit: the provenance in the ledger that it comes from, as JSON


def chunk_name(number: int) -> str:
    """Return the artifact name of one chunk of an export's file."""
    return f"file.{number:06}"


def put_artifact(session: Session, job_id: str, name: str, data: bytes) -> None:
    """Store an artifact, replacing one with the same name."""
    session.merge(JobArtifact(job_id=job_id, name=name, data=data))


def insert_artifact(session: Session, job_id: str, name: str, data: bytes) -> None:
    """Store an artifact that does not exist. The session does not keep its bytes."""
    session.execute(insert(JobArtifact), {"job_id": job_id, "name": name, "data": data})


def get_artifact(session: Session, job_id: str, name: str) -> bytes | None:
    """Return the bytes of an artifact; None when there is none."""
    artifact = session.get(JobArtifact, (job_id, name))
    return None if artifact is None else artifact.data


def has_artifact(session: Session, job_id: str, name: str) -> bool:
    """Return whether an artifact exists, without reading it."""
    return (
        session.scalar(select(JobArtifact.name).where(JobArtifact.job_id == job_id, JobArtifact.name == name))
        is not None
    )


def newest_classifier(session: Session, model: str, layer: int) -> bytes | None:
    """Return the artifact of the newest training of a classifier for a layer of a model; None without one."""
    kind = JOB_KINDS["training"]
    ended = select(Job.id, Job.result).where(Job.model == model, Job.kind == kind.name, Job.status == "done")
    for row in session.execute(ended.order_by(Job.ended.desc(), Job.id.desc()).limit(kind.max_kept)):
        if row.result["plan"]["layer"] == layer:
            return get_artifact(session, row.id, kind.result_artifact)
    return None


def delete_artifacts(session: Session, job: Job) -> None:
    """Delete the artifacts that a job which has just ended makes obsolete.

    A failed job keeps its artifacts, because a retry resumes from them. A finished job of a kind with `max_kept` keeps
    its own, or its `result_artifact` alone, and deletes those of the oldest finished jobs of its kind.
    """
    kind = JOB_KINDS[job.kind]
    if kind.result_artifact and job.status == "done":
        others = JobArtifact.name != kind.result_artifact
        session.execute(delete(JobArtifact).where(JobArtifact.job_id == job.id, others))
    if kind.max_kept and job.status == "done":
        ended = select(Job.id).where(Job.model == job.model, Job.kind == job.kind, Job.status == "done")
        expired = session.scalars(ended.order_by(Job.ended.desc(), Job.id.desc()).offset(kind.max_kept)).all()
        session.execute(delete(JobArtifact).where(JobArtifact.job_id.in_(expired)))
    elif kind.has_artifacts and job.status != "failed":
        session.execute(delete(JobArtifact).where(JobArtifact.job_id == job.id))
