"""What the resources of all jobs share: how far a job is, and what became of it."""

from __future__ import annotations

from pydantic import Field

from api.dependencies import Moment, Resource


class Progress(Resource):
    phase: str
    done: int
    total: int


class JobError(Resource):
    title: str
    detail: str


class Course(Resource):
    """The course of a job, from its asking to its end."""

    id: str
    progress: Progress | None = None
    error: JobError | None = None
    actor: str | None = None
    attempts: int = 0
    created: Moment | None = None
    started: Moment | None = None
    ended: Moment | None = None
    links: dict[str, str] = Field(default_factory=dict)
