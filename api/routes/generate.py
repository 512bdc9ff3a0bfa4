"""Text generation from any version."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field

from api import sse
from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.errors import problem_responses
from api.protected_route import ProtectedRoute, requires, run_on_body
from api.quotas import CallQuotaDep
from api.sse import EventStreamResponse
from service.application.api_keys import Scope
from service.schemas import GenerateRequest

router = APIRouter(tags=["generation"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class GenerationUsage(ResourceModel):
    prompt_tokens: int
    completion_tokens: int


class GenerationChoice(ResourceModel):
    text: str
    tokens: list[int]
    finish_reason: str
    edit: str | None = Field(
        None,
        description="the edit by SERAC whose statement was read before the prompt; left out where none was",
    )


class GenerationResponse(GenerationChoice):
    """The generation for `prompt`. `version` produced every token of it."""

    version: int
    usage: GenerationUsage
    seconds: float


class GenerationListResponse(ResourceModel):
    """The generations for `prompts`, in their order."""

    choices: list[GenerationChoice]
    version: int
    usage: GenerationUsage
    seconds: float


_TOWER = {"prompt": "The Eiffel Tower is located in the city of", "max_new_tokens": 5}
_EXAMPLES: dict[str, Any] = {
    "head": {"summary": "From the newest version", "value": _TOWER},
    "base": {"summary": "From the base model", "value": _TOWER | {"version": "base"}},
    "stream": {"summary": "Streamed token by token", "value": _TOWER | {"stream": True}},
    "many": {
        "summary": "Several prompts, sampled",
        "value": {
            "prompts": [_TOWER["prompt"], "Big Ben can be found in"],
            "max_new_tokens": 5,
            "temperature": 0.8,
            "top_p": 0.9,
            "seed": 7,
        },
    },
}


@router.post(
    "/generate",
    summary="Generate text",
    response_model=GenerationResponse | GenerationListResponse,
    response_model_exclude_unset=True,
    responses={
        200: {
            "description": "The text. With `stream`: `token` events, then `end` or `error`; `reset` makes the tokens so far void.",
            "content": sse.EVENT_STREAM_CONTENT,
        },
        **problem_responses(400, 409, 413, 415, 422, 500, 503),
    },
)
@requires(Scope.READ)
async def generate_text(
    body: Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
    quota: CallQuotaDep,
) -> Any:
    """Generate text from one version. The version is fixed at admission: a later edit does not change the generation.

    A stream sends `token` events, then `end` or `error`. If the worker dies, another one starts the generation again: a
    `reset` event makes all tokens so far void, and the whole generation follows.
    """
    await quota.charge(services.generation.count_tokens(body))
    rendered = body
    if services.generation.needs_rendering(body):
        rendered = await run_on_body(request, services.generation.render_generation, body)
    channel = await run_on_body(request, services.generation.generate, rendered, quota.caller)
    call = EngineCall("generate", channel, rendered, services, broker, quota.caller)
    if body.stream:
        return EventStreamResponse(call.events(), call.cancel)
    result = await call.wait_for_result(request)
    if result is None:
        return Response(status_code=499)  # the client has disconnected
    if body.prompts is not None:
        return result
    return {**result["choices"][0], **{name: result[name] for name in ("version", "usage", "seconds")}}
