"""Comparison of one prompt on two versions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.errors import problem_responses
from api.protected_route import ProtectedRoute, requires, run_on_body
from api.quotas import CallQuotaDep
from service.application.api_keys import Scope
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
    p: list[float] = Field(description="probability of the token in each version")


class Comparison(ResourceModel):
    prompt: str
    sides: list[ComparisonSide]
    next_tokens: list[NextToken] = Field(description="the tokens whose probabilities differ most come first")
    total_variation: float = Field(
        description="half the sum of all absolute differences of probability: 0 if equal, 1 if disjoint"
    )
    seconds: float


_EXAMPLES: dict[str, Any] = {
    "base and head": {
        "summary": "The effect of all edits",
        "value": {"prompt": "The Eiffel Tower is located in the city of", "max_new_tokens": 5},
    },
}


@router.post(
    "/compare",
    summary="Compare two versions",
    response_model=Comparison,
    responses=problem_responses(400, 409, 413, 415, 422, 500, 503),
)
@requires(Scope.READ)
async def compare_versions(
    body: Annotated[CompareRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
    quota: CallQuotaDep,
) -> Any:
    """Generate text from both versions and compare their next-token distributions."""
    await quota.charge(services.generation.count_tokens(body))
    rendered = body
    if services.generation.needs_rendering(body):
        rendered = await run_on_body(request, services.generation.render_comparison, body)
    channel = await run_on_body(request, services.generation.compare, rendered, quota.caller)
    call = EngineCall("compare", channel, rendered, services, broker, quota.caller)
    result = await call.wait_for_result(request)
    return Response(status_code=499) if result is None else result  # 499: the client has disconnected
