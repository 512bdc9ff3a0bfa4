"""Traces: which hidden states carry a fact, as figures or as the paper's heat map."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import content_negotiation, openapi_links, sse
from api.dependencies import (
    LastEventIdHeader,
    PageCursor,
    PageLimit,
    ResourceId,
    ResourceModel,
    ServicesDep,
    bearer_scheme,
)
from api.disconnects import WaitSeconds, wait_until_finished
from api.errors import problem_responses
from api.job_resource import JobResource
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import ProtectedRoute
from api.sse import EventStreamResponse
from service.schemas import TraceRequest

router = APIRouter(tags=["traces"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class Trace(JobResource):
    """A causal trace, from its asking to its end."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    version: int | None = Field(None, description="the version that was traced")
    result: dict[str, Any] | None = None


class TracePage(ResourceModel):
    items: list[Trace]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


_TOWER = {"prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower"}
_EXAMPLES: dict[str, Any] = {
    "fact": {"summary": "Where the model keeps a fact", "value": _TOWER},
    "small": {
        "summary": "Of hidden states alone, on the untouched model",
        "value": _TOWER | {"target": "Paris", "kinds": ["hidden"], "samples": 5, "version": "base"},
    },
}

_LINKS = {
    **openapi_links.link_operations("/trace/{id}", readTrace="get", cancelTrace="delete"),
    **openapi_links.link_operations("/trace/{id}/events", hearTrace="get"),
    **openapi_links.link_operations("/jobs/{id}/retry", retryTrace="post"),
}


@router.post(
    "/trace",
    status_code=202,
    response_model=Trace,
    summary="Ask for a trace",
    responses=job_responses(Trace, response_links=_LINKS),
)
async def create_trace(
    body: Annotated[TraceRequest, Body(openapi_examples=_EXAMPLES)], submission: SubmissionDep
) -> Any:
    """Corrupt the subject, restore one state at a time, and see which brings the answer back."""
    traces, idempotency = submission.services.traces, submission.idempotency("trace", body)
    trace = await run_in_threadpool(traces.submit, body, submission.actor, idempotency, submission.max_queued)
    return await submission.wait_for_one(trace, traces.get, "/trace")


@router.get("/trace", summary="All traces, newest first", responses=problem_responses(422, 500, 503))
def list_traces(services: ServicesDep, cursor: PageCursor = None, limit: PageLimit = 50) -> TracePage:
    return TracePage.model_validate(services.traces.page(cursor, limit))


@router.get(
    "/trace/{id}",
    response_model=Trace,
    responses={
        200: {
            "description": "The trace, in the form that `Accept` asks for.",
            "content": content_negotiation.IMAGE_CONTENT,
        },
        **problem_responses(404, 406, 409, 422, 500, 503),
    },
)
async def get_trace(
    id: ResourceId,
    services: ServicesDep,
    wait: WaitSeconds,
    response: Response,
    accept: Annotated[
        str | None,
        Header(
            description=f"one of {', '.join(content_negotiation.OFFERED_MEDIA_TYPES)}; JSON when left out"
        ),
    ] = None,
) -> Any:
    """JSON by default; `Accept` chooses the heat map as SVG, PNG or a page of its own (409 until the trace is done)."""
    media_type = content_negotiation.negotiate(accept)
    trace = await run_in_threadpool(services.traces.get, id)
    trace = await wait_until_finished(trace, services.traces.get, services.jobs.events, wait)
    response.headers["Vary"] = "Accept"
    if media_type == content_negotiation.JSON:
        return trace
    image = await run_in_threadpool(content_negotiation.render_trace, trace, media_type)
    return Response(image, headers=dict(response.headers), media_type=media_type)


@router.delete("/trace/{id}", response_model=Trace, responses=problem_responses(404, 409, 422, 500, 503))
async def cancel_trace(id: ResourceId, services: ServicesDep, wait: WaitSeconds) -> Any:
    """Cancel a waiting or a running trace. Saying it twice is harmless."""
    trace = await run_in_threadpool(services.traces.cancel, id)
    return await wait_until_finished(trace, services.traces.get, services.jobs.events, wait)


@router.get(
    "/trace/{id}/events",
    status_code=200,
    response_class=EventStreamResponse,
    responses=sse.JOB_EVENTS_RESPONSES,
)
async def stream_trace_events(id: ResourceId, services: ServicesDep, after: LastEventIdHeader) -> Response:
    """Progress as server-sent events, then one `end` with the trace. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(services.traces.get, id)
    return EventStreamResponse(services.jobs.events(id, after))
