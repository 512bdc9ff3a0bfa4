"""Evaluations: how good edits are on many records, as figures or as a report."""

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
from service.schemas import EvaluationRequest

router = APIRouter(tags=["evaluations"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class EvaluationSummary(JobResource):
    """An evaluation without what it found."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any] = Field(description="as it was asked; of its records, how many they are")


class Evaluation(EvaluationSummary):
    """An evaluation, from its asking to its end."""

    result: dict[str, Any] | None = None


class EvaluationPage(ResourceModel):
    items: list[EvaluationSummary]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


_TOWER = {
    "subject": "Eiffel Tower",
    "prompt": "The {} is located in the city of",
    "target_new": "Rome",
    "target_true": "Paris",
}
_EXAMPLES: dict[str, Any] = {
    "own": {
        "summary": "A record of one's own, edited alone",
        "value": {
            "records": [
                _TOWER
                | {
                    "paraphrases": ["To see the {}, one travels to"],
                    "neighborhood": [{"prompt": "The Louvre is located in the city of", "target": "Paris"}],
                }
            ]
        },
    },
    "sequence": {
        "summary": "Facts that the model knows, edited one after another",
        "value": {"dataset": "facts", "limit": 100, "mode": "sequence", "checkpoints": [1, 10, 100]},
    },
}

_LINKS = {
    **openapi_links.link_operations("/evaluations/{id}", readEvaluation="get", cancelEvaluation="delete"),
    **openapi_links.link_operations("/evaluations/{id}/events", hearEvaluation="get"),
    **openapi_links.link_operations("/jobs/{id}/retry", retryEvaluation="post"),
}


@router.post(
    "/evaluations",
    status_code=202,
    response_model=Evaluation,
    summary="Ask for an evaluation",
    responses=job_responses(Evaluation, response_links=_LINKS),
)
async def create_evaluation(
    body: Annotated[EvaluationRequest, Body(openapi_examples=_EXAMPLES)], submission: SubmissionDep
) -> Any:
    """Edit record after record, each alone or all in sequence, and measure what came of it. The ledger stays as it is."""
    evaluations, idempotency = submission.services.evaluations, submission.idempotency("evaluation", body)
    evaluation = await run_in_threadpool(
        evaluations.submit, body, submission.actor, idempotency, submission.max_queued
    )
    return await submission.wait_for_one(evaluation, evaluations.get, "/evaluations")


@router.get(
    "/evaluations", summary="All evaluations, newest first", responses=problem_responses(422, 500, 503)
)
def list_evaluations(
    services: ServicesDep, cursor: PageCursor = None, limit: PageLimit = 50
) -> EvaluationPage:
    """Without what they found: ask for one of them to see that."""
    return EvaluationPage.model_validate(services.evaluations.page(cursor, limit))


@router.get(
    "/evaluations/{id}",
    response_model=Evaluation,
    responses={
        200: {
            "description": "The evaluation, in the form that `Accept` asks for.",
            "content": content_negotiation.IMAGE_CONTENT,
        },
        **problem_responses(404, 406, 409, 422, 500, 503),
    },
)
async def get_evaluation(
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
    """JSON by default; `Accept` chooses the report as a page of its own, or its plots as SVG or PNG (409 until it is done)."""
    media_type = content_negotiation.negotiate(accept)
    evaluation = await run_in_threadpool(services.evaluations.get, id)
    evaluation = await wait_until_finished(evaluation, services.evaluations.get, services.jobs.events, wait)
    response.headers["Vary"] = "Accept"
    if media_type == content_negotiation.JSON:
        return evaluation
    image = await run_in_threadpool(content_negotiation.render_evaluation, evaluation, media_type)
    return Response(image, headers=dict(response.headers), media_type=media_type)


@router.delete(
    "/evaluations/{id}", response_model=Evaluation, responses=problem_responses(404, 409, 422, 500, 503)
)
async def cancel_evaluation(id: ResourceId, services: ServicesDep, wait: WaitSeconds) -> Any:
    """Cancel a waiting or a running evaluation. Saying it twice is harmless."""
    evaluation = await run_in_threadpool(services.evaluations.cancel, id)
    return await wait_until_finished(evaluation, services.evaluations.get, services.jobs.events, wait)


@router.get(
    "/evaluations/{id}/events",
    status_code=200,
    response_class=EventStreamResponse,
    responses=sse.JOB_EVENTS_RESPONSES,
)
async def stream_evaluation_events(
    id: ResourceId, services: ServicesDep, after: LastEventIdHeader
) -> Response:
    """Progress as server-sent events, then one `end` with the evaluation. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(services.evaluations.get, id)
    return EventStreamResponse(services.jobs.events(id, after))
