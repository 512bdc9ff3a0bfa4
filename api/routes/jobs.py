"""Jobs of all kinds in one list, and another chance for those that failed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field

from api import openapi_links
from api.dependencies import Actor, Cursor, Id, Limit, Resource, Work, bearer
from api.errors import problems
from api.job_resource import Course
from api.protected_route import Door
from api.routes.edits import EditStatus

router = APIRouter(tags=["jobs"], route_class=Door, dependencies=[bearer])

Kind = Literal["edit", "trace", "export", "evaluation"]
Status = EditStatus | Literal["done"]


class Job(Course):
    """A job of any kind, without what it was asked and what it found: `links` lead there."""

    kind: Kind
    status: Status
    dead: bool = Field(description="given up after too many attempts")
    subject: str
    worker: str | None = Field(None, description="that has it, or had it last")
    request_id: str | None = Field(None, description="of the request that asked for it, as in the logs")


class JobPage(Resource):
    items: list[Job]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


@router.get(
    "/jobs",
    response_model=JobPage,
    summary="All jobs, newest first",
    responses=problems(422, 500, 503),
)
def listing(
    work: Work,
    status: Annotated[Status | None, Query()] = None,
    kind: Annotated[Kind | None, Query()] = None,
    dead: Annotated[bool | None, Query(description="only those given up after too many attempts")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Any:
    """`?dead=true` are the jobs whose workers died again and again: look at their `error`, then retry them."""
    return work.jobs.page(status, kind, dead, cursor, limit)


@router.post(
    "/jobs/{id}/retry",
    status_code=202,
    response_model=Job,
    summary="Try a failed job again",
    responses={
        202: {"description": "Queued again.", "headers": openapi_links.LOCATION},
        **problems(400, 404, 409, 413, 415, 422, 500, 503),
    },
)
def retry(id: Id, work: Work, actor: Actor, response: Response) -> Any:
    """It waits as if it had never been tried. `409` for a job that has not failed."""
    job = work.jobs.retry(id, actor)
    response.headers["Location"] = job["links"]["self"]
    return job
