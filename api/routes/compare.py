"""Comparison: one prompt on two versions, side by side."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.errors import problem_responses
from api.protected_route import ProtectedRoute
from service.schemas import CompareRequest

router = APIRouter(tags=["generation"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class ComparisonSide(ResourceModel):
    version: int
    text: str
    tokens: list[int]
    finish_reason: str


class NextToken(ResourceModel):
    token: str
    id: int
    p: list[float] = Field(description="its probability on each side")


class Comparison(ResourceModel):
    prompt: str
    sides: list[ComparisonSide]
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
    responses=problem_responses(400, 409, 413, 415, 422, 500, 503),
)
async def compare_versions(
    body: Annotated[CompareRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
) -> Any:
    """Both texts, and the next-token distributions where they differ."""
    channel = await run_in_threadpool(services.generation.compare, body)
    result = await EngineCall("compare", channel, body, services, broker).wait_for_result(request)
    return Response(status_code=499) if result is None else result  # 499: nobody reads it
