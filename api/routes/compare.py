"""Comparison: one prompt on two versions, side by side."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api.dependencies import Bell, Resource, Work, bearer
from api.engine_calls import Call
from api.errors import problems
from api.protected_route import Door
from service.schemas import CompareRequest

router = APIRouter(tags=["generation"], route_class=Door, dependencies=[bearer])


class Side(Resource):
    version: int
    text: str
    tokens: list[int]
    finish_reason: str


class NextToken(Resource):
    token: str
    id: int
    p: list[float] = Field(description="its probability on each side")


class Comparison(Resource):
    prompt: str
    sides: list[Side]
    next_tokens: list[NextToken] = Field(description="those that differ most come first")
    total_variation: float = Field(description="half the sum of all differences: 0 is alike, 1 is disjoint")
    seconds: float


_EXAMPLES: dict[str, Any] = {
    "since the beginning": {
        "summary": "What all edits changed",
        "value": {"prompt": "The Eiffel Tower is located in the city of", "max_new_tokens": 5},
    },
}


@router.post(
    "/compare",
    response_model=Comparison,
    responses=problems(400, 409, 413, 415, 422, 500, 503),
)
async def compare(
    asked: Annotated[CompareRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    work: Work,
    broker: Bell,
) -> Any:
    """Both texts, and the next-token distributions where they differ."""
    channel = await run_in_threadpool(work.calls.compare, asked)
    said = await Call("compare", channel, asked, work, broker).answer(request)
    return Response(status_code=499) if said is None else said  # 499: nobody reads it
