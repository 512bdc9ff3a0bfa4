"""Evaluations: how good edits are on many records, as figures or as a report."""

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
from service.schemas import EvaluationRequest

router = APIRouter(tags=["evaluations"], route_class=Door, dependencies=[bearer])


class ListedEvaluation(Course):
    """An evaluation without what it found."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any] = Field(description="as it was asked; of its records, how many they are")


class Evaluation(ListedEvaluation):
    """An evaluation, from its asking to its end."""

    result: dict[str, Any] | None = None


class EvaluationPage(Resource):
    items: list[ListedEvaluation]
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
    **openapi_links.to("/evaluations/{id}", readEvaluation="get", cancelEvaluation="delete"),
    **openapi_links.to("/evaluations/{id}/events", hearEvaluation="get"),
    **openapi_links.to("/jobs/{id}/retry", retryEvaluation="post"),
}


@router.post(
    "/evaluations",
    status_code=202,
    response_model=Evaluation,
    summary="Ask for an evaluation",
    responses=answers(Evaluation, then=_LINKS),
)
async def submit(
    asked: Annotated[EvaluationRequest, Body(openapi_examples=_EXAMPLES)], submitted: Submitted
) -> Any:
    """Edit record after record, each alone or all in sequence, and measure what came of it. The ledger stays as it is."""
    evaluations, known = submitted.work.evaluations, submitted.once("evaluation", asked)
    evaluation = await run_in_threadpool(evaluations.submit, asked, submitted.actor, known, submitted.most)
    return await submitted.one(evaluation, evaluations.get, "/evaluations")


@router.get("/evaluations", summary="All evaluations, newest first", responses=problems(422, 500, 503))
def listing(work: Work, cursor: Cursor = None, limit: Limit = 50) -> EvaluationPage:
    """Without what they found: ask for one of them to see that."""
    return EvaluationPage.model_validate(work.evaluations.page(cursor, limit))


@router.get(
    "/evaluations/{id}",
    response_model=Evaluation,
    responses={
        200: {
            "description": "The evaluation, in the form that `Accept` asks for.",
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
    """JSON by default; `Accept` chooses the report as a page of its own, or its plots as SVG or PNG (409 until it is done)."""
    media_type = content_negotiation.negotiate(accept)
    evaluation = await run_in_threadpool(work.evaluations.get, id)
    evaluation = await until_ended(evaluation, work.evaluations.get, work.jobs.events, wait)
    response.headers["Vary"] = "Accept"
    if media_type == content_negotiation.JSON:
        return evaluation
    drawn = await run_in_threadpool(content_negotiation.evaluation, evaluation, media_type)
    return Response(drawn, headers=dict(response.headers), media_type=media_type)


@router.delete("/evaluations/{id}", response_model=Evaluation, responses=problems(404, 409, 422, 500, 503))
async def cancel(id: Id, work: Work, wait: Wait) -> Any:
    """Cancel a waiting or a running evaluation. Saying it twice is harmless."""
    evaluation = await run_in_threadpool(work.evaluations.cancel, id)
    return await until_ended(evaluation, work.evaluations.get, work.jobs.events, wait)


@router.get(
    "/evaluations/{id}/events",
    status_code=200,
    response_class=EventStream,
    responses=sse.FOLLOWED,
)
async def news(id: Id, work: Work, after: LastEventId) -> Response:
    """Progress as server-sent events, then one `end` with the evaluation. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(work.evaluations.get, id)
    return EventStream(work.jobs.events(id, after))
