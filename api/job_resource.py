"""The routes that all kinds of jobs share: create, list, get, cancel and stream events.

`job_router` builds all of them from a row of `service/jobs/job_kinds.py`. A kind with routes of its own uses
`JobRoutes` to add the shared ones to its router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Body, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, create_model

from api import content_negotiation, openapi_links, sse
from api.dependencies import (
    ActorDep,
    LastEventIdHeader,
    PageCursor,
    PageLimit,
    ResourceId,
    ResourceModel,
    ServicesDep,
    Timestamp,
    bearer_scheme,
)
from api.disconnects import WaitSeconds, wait_until_finished
from api.errors import problem_responses
from api.job_submission import SubmissionDep, job_responses
from api.large_answers import enter_answer_slot
from api.protected_route import ProtectedRoute, RequestBody, requires
from api.quotas import CallQuotaDep
from api.sse import EventStreamResponse
from service.application.api_keys import Scope
from service.jobs.job_kinds import JOB_KINDS, JobKind
from service.jobs.views import EDIT_STATUSES, JOB_STATUSES, ResourceDict

if TYPE_CHECKING:
    EditStatus: TypeAlias = str
    JobStatus: TypeAlias = str
    JobKindName: TypeAlias = str
else:
    EditStatus = Literal[EDIT_STATUSES]
    JobStatus = Literal[JOB_STATUSES]
    JobKindName = Literal[tuple(JOB_KINDS)]


class Progress(ResourceModel):
    """The phase of a running job, and the steps done in it."""

    phase: str
    done: int
    total: int
    seconds_left: float | None = Field(
        None, description="an estimate of the time until the job, or what it waits for, is ready"
    )


class JobError(ResourceModel):
    """Why a job failed."""

    code: str = Field(description="stable identifier of the error; docs/errors.md lists all codes")
    title: str
    detail: str


class JobResource(ResourceModel):
    """The fields that all jobs have."""

    id: str
    status: JobStatus
    progress: Progress | None = None
    error: JobError | None = None
    actor: str | None = Field(None, description="the API key that submitted the job")
    cancelled_by: str | None = Field(
        None, description="the API key that cancelled the job, or asked for it while the job runs"
    )
    attempts: int = Field(0, description="how often a worker has started the job")
    created: Timestamp | None = None
    started: Timestamp | None = None
    ended: Timestamp | None = None
    links: dict[str, str] = Field(default_factory=dict)


class ResultJobResource(JobResource):
    """A job with its request and its result."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class JobRoutes:
    """Adds the shared routes of one kind of job to a router."""

    kind: JobKind
    resource: Any  #: response model of one job
    list_resource: Any = None  #: response model of a job in a list; None is the same as `resource`
    examples: dict[str, Any] = field(default_factory=dict)  #: OpenAPI examples of the request body
    cancel_name: str = ""  #: operation id of DELETE; "" is `cancel_` and the name of the kind
    router: APIRouter = field(init=False)

    def __post_init__(self) -> None:
        tags: list[Any] = [f"{self.kind.name}s"]
        router = APIRouter(tags=tags, route_class=ProtectedRoute, dependencies=[bearer_scheme])
        object.__setattr__(self, "router", router)

    @property
    def response_links(self) -> openapi_links.OpenApiLinks:
        """Return the OpenAPI links from a created job to the operations on it."""
        kind, link = self.kind, openapi_links.link_operations
        return {
            **link(
                f"{kind.path}/{{id}}",
                **{f"get_{kind.name}": "get", self.cancel_name or f"cancel_{kind.name}": "delete"},
            ),
            **link(f"{kind.path}/{{id}}/events", **{f"stream_{kind.name}_events": "get"}),
            **link("/jobs/{id}/retry", retry_job="post"),
        }

    def add_create(self, description: str = "", body: RequestBody = RequestBody.JSON) -> None:
        """Add POST on the collection: validate the request and queue a job."""
        kind = self.kind

        async def create(body: Any, submission: SubmissionDep) -> Any:
            service = submission.services.by_kind[kind.name]
            job = await submission.submit(service.submit, body, kind.name)
            return await submission.wait_for_one(job, service.get, kind.path)

        create.__annotations__["body"] = Annotated[
            kind.request_class(), Body(openapi_examples=self.examples or None)
        ]
        self.router.post(
            kind.path,
            name=f"create_{kind.name}",
            summary=f"Create {_article(kind.name)}",
            description=description,
            status_code=202,
            response_model=self.resource,
            responses=job_responses(self.resource, 409, response_links=self.response_links),
        )(requires(Scope(kind.submit_scope), body)(create))

    def add_list(self, description: str = "") -> None:
        """Add GET on the collection: a page of jobs, newest first."""
        kind, items = self.kind, self.list_resource or self.resource

        def list_jobs(services: ServicesDep, cursor: PageCursor = None, limit: PageLimit = 50) -> Any:
            return services.by_kind[kind.name].page(cursor, limit)

        self.router.get(
            kind.path,
            name=f"list_{kind.name}s",
            summary=f"List {kind.name}s, newest first",
            description=description,
            response_model=page_model(f"{self.resource.__name__}Page", items),
            responses=problem_responses(422, 500, 503),
        )(list_jobs)

    def add_get(
        self, description: str = "", render: Callable[[ResourceDict, str], str | bytes] | None = None
    ) -> None:
        """Add GET on one job. With `render`, the `Accept` header can request an image or a page of the result."""
        kind = self.kind

        async def wait_for_job(request: Request, id: str, services: Any, wait: float) -> ResourceDict:
            get: Callable[[str], ResourceDict] = services.by_kind[kind.name].get
            if wait:
                job = await run_in_threadpool(get, id)
                await wait_until_finished(job, get, services.jobs.events, wait)
            await enter_answer_slot(request)
            return await run_in_threadpool(get, id)

        async def get_job(id: ResourceId, request: Request, services: ServicesDep, wait: WaitSeconds) -> Any:
            return await wait_for_job(request, id, services, wait)

        async def get_rendered_job(
            id: ResourceId,
            request: Request,
            services: ServicesDep,
            wait: WaitSeconds,
            response: Response,
            accept: Annotated[
                str | None,
                Header(
                    description=f"one of {', '.join(content_negotiation.OFFERED_MEDIA_TYPES)}; JSON by default"
                ),
            ] = None,
        ) -> Any:
            media_type = content_negotiation.negotiate(accept)
            job = await wait_for_job(request, id, services, wait)
            response.headers["Vary"] = "Accept"
            if media_type == content_negotiation.JSON or render is None:
                return job
            content = await run_in_threadpool(render, job, media_type)
            return Response(content, headers=dict(response.headers), media_type=media_type)

        content = {"description": f"The {kind.name}.", "content": content_negotiation.IMAGE_CONTENT}
        self.router.get(
            f"{kind.path}/{{id}}",
            name=f"get_{kind.name}",
            summary=f"Get {_article(kind.name)}",
            description=description
            or f"Return the current state of the {kind.name}. `Prefer: wait=SECONDS` waits until it has ended.",
            response_model=self.resource,
            responses=problem_responses(404, 422, 500, 503)
            if render is None
            else {200: content, **problem_responses(404, 406, 409, 422, 500, 503)},
        )(get_job if render is None else get_rendered_job)

    def add_cancel(self, summary: str = "", description: str = "") -> None:
        """Add DELETE on one job: cancel it, or revert an applied edit."""
        kind = self.kind

        async def cancel(id: ResourceId, services: ServicesDep, actor: ActorDep, wait: WaitSeconds) -> Any:
            service = services.by_kind[kind.name]
            job = await run_in_threadpool(service.cancel, id, actor)
            return await wait_until_finished(job, service.get, services.jobs.events, wait)

        self.router.delete(
            f"{kind.path}/{{id}}",
            name=self.cancel_name or f"cancel_{kind.name}",
            summary=summary or f"Cancel {_article(kind.name)}",
            description=description or f"Cancel a queued or running {kind.name}. The call is idempotent.",
            response_model=self.resource,
            responses=problem_responses(404, 409, 422, 500, 503),
        )(requires(Scope(kind.cancel_scope))(cancel))

    def add_events(self) -> None:
        """Add the server-sent events of one job."""
        kind = self.kind

        async def stream_events(
            id: ResourceId, services: ServicesDep, after: LastEventIdHeader, _: CallQuotaDep
        ) -> Response:
            await run_in_threadpool(services.by_kind[kind.name].get, id)
            return EventStreamResponse(services.jobs.events(id, after))

        self.router.get(
            f"{kind.path}/{{id}}/events",
            name=f"stream_{kind.name}_events",
            summary=f"Stream the events of {_article(kind.name)}",
            description=f"Stream `progress` events, then one `end` event with the {kind.name}. The header `Last-Event-ID` "
            "resumes the stream after an event.",
            status_code=200,
            response_class=EventStreamResponse,
            responses=sse.JOB_EVENTS_RESPONSES,
        )(stream_events)


def job_router(kind: JobKind) -> APIRouter:
    """Return the router of a kind of job that has no routes of its own."""
    resource = create_model(kind.name.capitalize(), __base__=ResultJobResource, __doc__=f"One {kind.name}.")
    routes = JobRoutes(kind, resource)
    routes.add_create()
    routes.add_list()
    routes.add_get()
    routes.add_cancel()
    routes.add_events()
    return routes.router


def page_model(name: str, items: Any) -> Any:
    """Return the response model of a page of resources."""
    next_cursor = Field(None, description="cursor of the next page; null on the last page")
    return create_model(
        name, __base__=ResourceModel, items=(list[items], ...), next=(str | None, next_cursor)
    )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
