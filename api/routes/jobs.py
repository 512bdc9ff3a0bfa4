"""Jobs of all kinds in one list, and another chance for those that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import Field

from api import openapi_links
from api.dependencies import (
    ActorDep,
    PageCursor,
    PageLimit,
    ResourceId,
    ResourceModel,
    ServicesDep,
    bearer_scheme,
)
from api.errors import problem_responses
from api.job_resource import JobResource
from api.protected_route import ProtectedRoute
from api.routes.edits import EditStatus
from service.jobs.job_kinds import JOB_KINDS

router = APIRouter(tags=["jobs"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

if TYPE_CHECKING:
    JobKindName = str
else:
    JobKindName = Literal[*JOB_KINDS]
JobStatus = EditStatus | Literal["done"]


class Job(JobResource):
    """A job of any kind, without what it was asked and what it found: `links` lead there."""

    kind: JobKindName
    status: JobStatus
    exhausted: bool = Field(description="given up after too many attempts")
    subject: str
    worker: str | None = Field(None, description="that has it, or had it last")
    request_id: str | None = Field(None, description="of the request that asked for it, as in the logs")


class JobPage(ResourceModel):
    items: list[Job]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


@router.get(
    "/jobs",
    response_model=JobPage,
    summary="All jobs, newest first",
    responses=problem_responses(422, 500, 503),
)
def list_jobs(
    services: ServicesDep,
    status: Annotated[JobStatus | None, Query()] = None,
    kind: Annotated[JobKindName | None, Query()] = None,
    exhausted: Annotated[
        bool | None, Query(description="only those given up after too many attempts")
    ] = None,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
) -> Any:
    """`?dead=true` are the jobs whose workers died again and again: look at their `error`, then retry them."""
    return services.jobs.page(status, kind, exhausted, cursor, limit)


@router.post(
    "/jobs/{id}/retry",
    status_code=202,
    response_model=Job,
    summary="Try a failed job again",
    responses={
        202: {"description": "Queued again.", "headers": openapi_links.LOCATION_HEADER},
        **problem_responses(400, 404, 409, 413, 415, 422, 500, 503),
    },
)
def retry_job(id: ResourceId, services: ServicesDep, actor: ActorDep, response: Response) -> Any:
    """It waits as if it had never been tried. `409` for a job that has not failed."""
    job = services.jobs.retry(id, actor)
    response.headers["Location"] = job["links"]["self"]
    return job
