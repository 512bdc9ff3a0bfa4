"""Traces: which hidden states carry a fact, as figures or as the paper's heat map."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import content_negotiation, openapi_links, sse
from api.dependencies import (
    Cursor,
    Id,
    LastEventId,
    Limit,
    Resource,
    Work,
    bearer,
)
from api.disconnects import Wait, until_ended
from api.errors import problems
from api.job_resource import Course
from api.job_submission import Submitted, answers
from api.protected_route import Door
from api.sse import EventStream
from service.schemas import TraceRequest

router = APIRouter(tags=["traces"], route_class=Door, dependencies=[bearer])


class Trace(Course):
    """A causal trace, from its asking to its end."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    version: int | None = Field(None, description="the version that was traced")
    result: dict[str, Any] | None = None


class TracePage(Resource):
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
    **openapi_links.to("/trace/{id}", readTrace="get", cancelTrace="delete"),
    **openapi_links.to("/trace/{id}/events", hearTrace="get"),
    **openapi_links.to("/jobs/{id}/retry", retryTrace="post"),
}


@router.post(
    "/trace",
    status_code=202,
    response_model=Trace,
    summary="Ask for a trace",
    responses=answers(Trace, then=_LINKS),
)
async def submit(
    asked: Annotated[TraceRequest, Body(openapi_examples=_EXAMPLES)], submitted: Submitted
) -> Any:
    """Corrupt the subject, restore one state at a time, and see which brings the answer back."""
    traces, known = submitted.work.traces, submitted.once("trace", asked)
    trace = await run_in_threadpool(traces.submit, asked, submitted.actor, known, submitted.most)
    return await submitted.one(trace, traces.get, "/trace")


@router.get("/trace", summary="All traces, newest first", responses=problems(422, 500, 503))
def listing(work: Work, cursor: Cursor = None, limit: Limit = 50) -> TracePage:
    return TracePage.model_validate(work.traces.page(cursor, limit))


@router.get(
    "/trace/{id}",
    response_model=Trace,
    responses={
        200: {
            "description": "The trace, in the form that `Accept` asks for.",
            "content": content_negotiation.DOCUMENTED,
        },
        **problems(404, 406, 409, 422, 500, 503),
    },
)
async def one(
    id: Id,
    work: Work,
    wait: Wait,
    response: Response,
    accept: Annotated[
        str | None, Header(description=f"one of {', '.join(content_negotiation.OFFERED)}; JSON when left out")
    ] = None,
) -> Any:
    """JSON by default; `Accept` chooses the heat map as SVG, PNG or a page of its own (409 until the trace is done)."""
    media_type = content_negotiation.negotiate(accept)
    trace = await run_in_threadpool(work.traces.get, id)
    trace = await until_ended(trace, work.traces.get, work.jobs.events, wait)
    response.headers["Vary"] = "Accept"
    if media_type == content_negotiation.JSON:
        return trace
    drawn = await run_in_threadpool(content_negotiation.trace, trace, media_type)
    return Response(drawn, headers=dict(response.headers), media_type=media_type)


@router.delete("/trace/{id}", response_model=Trace, responses=problems(404, 409, 422, 500, 503))
async def cancel(id: Id, work: Work, wait: Wait) -> Any:
    """Cancel a waiting or a running trace. Saying it twice is harmless."""
    trace = await run_in_threadpool(work.traces.cancel, id)
    return await until_ended(trace, work.traces.get, work.jobs.events, wait)


@router.get(
    "/trace/{id}/events",
    status_code=200,
    response_class=EventStream,
    responses=sse.FOLLOWED,
)
async def news(id: Id, work: Work, after: LastEventId) -> Response:
    """Progress as server-sent events, then one `end` with the trace. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(work.traces.get, id)
    return EventStream(work.jobs.events(id, after))
