"""What the resources of all jobs share: how far a job is, and what became of it."""

from __future__ import annotations

from pydantic import Field

from api.dependencies import ResourceModel, Timestamp


class Progress(ResourceModel):
    phase: str
    done: int
    total: int


class JobError(ResourceModel):
    """Why a job failed."""

    code: str = Field(description="stable identifier of the error; docs/errors.md lists all codes")
    title: str
    detail: str


class JobResource(ResourceModel):
    """The course of a job, from its asking to its end."""

    id: str
    progress: Progress | None = None
    error: JobError | None = None
    actor: str | None = None
    attempts: int = 0
    created: Timestamp | None = None
    started: Timestamp | None = None
    ended: Timestamp | None = None
    links: dict[str, str] = Field(default_factory=dict)
