"""Jobs of all kinds: list them, and retry failed ones."""

from __future__ import annotations

from typing import Annotated, Any

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
from api.job_resource import JobKindName, JobResource, JobStatus
from api.protected_route import ProtectedRoute, requires
from service.application.api_keys import Scope

router = APIRouter(tags=["jobs"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class Job(JobResource):
    """A job of any kind without its request and result; `links.self` has them."""

    kind: JobKindName
    exhausted: bool = Field(description="whether the job failed because all its attempts were used up")
    subject: str = Field(description="short description of the job")
    worker: str | None = Field(None, description="the worker that runs the job, or ran it last")
    request_id: str | None = Field(
        None, description="id of the HTTP request that created the job, as in the logs"
    )


class JobPage(ResourceModel):
    items: list[Job]
    next: str | None = Field(None, description="cursor of the next page; null on the last page")


@router.get(
    "/jobs",
    response_model=JobPage,
    summary="List jobs of all kinds, newest first",
    responses=problem_responses(422, 500, 503),
)
def list_jobs(
    services: ServicesDep,
    status: Annotated[JobStatus | None, Query()] = None,
    kind: Annotated[JobKindName | None, Query()] = None,
    exhausted: Annotated[
        bool | None, Query(description="only jobs whose attempts are used up, or only others")
    ] = None,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
) -> Any:
    """`?exhausted=true` lists the jobs whose workers died repeatedly: read their `error`, then retry them."""
    return services.jobs.page(status, kind, exhausted, cursor, limit)


@router.post(
    "/jobs/{id}/retry",
    status_code=202,
    response_model=Job,
    summary="Retry a failed job",
    responses={
        202: {"description": "Queued again.", "headers": openapi_links.LOCATION_HEADER},
        **problem_responses(400, 404, 409, 413, 415, 422, 500, 503),
    },
)
@requires(Scope.ADMIN)
def retry_job(id: ResourceId, services: ServicesDep, actor: ActorDep, response: Response) -> Any:
    """Queue a failed job again with a new set of attempts. Status 409 means that the job has not failed."""
    job = services.jobs.retry(id, actor)
    response.headers["Location"] = job["links"]["self"]
    return job
