"""Generation: let the model speak, at any version."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import sse
from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.errors import problem_responses
from api.protected_route import ProtectedRoute
from api.sse import EventStreamResponse
from service.schemas import GenerateRequest

router = APIRouter(tags=["generation"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class GenerationUsage(ResourceModel):
    prompt_tokens: int
    completion_tokens: int


class GenerationChoice(ResourceModel):
    text: str
    tokens: list[int]
    finish_reason: str


class GenerationResponse(GenerationChoice):
    """The answer to `prompt`. `version` is the one that produced every token of it."""

    version: int
    usage: GenerationUsage
    seconds: float


class GenerationListResponse(ResourceModel):
    """The answer to `prompts`, in their order."""

    choices: list[GenerationChoice]
    version: int
    usage: GenerationUsage
    seconds: float


_TOWER = {"prompt": "The Eiffel Tower is located in the city of", "max_new_tokens": 5}
_EXAMPLES: dict[str, Any] = {
    "head": {"summary": "What the model says now", "value": _TOWER},
    "base": {"summary": "What it said before any edit", "value": _TOWER | {"version": "base"}},
    "stream": {"summary": "Token by token", "value": _TOWER | {"stream": True}},
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
    response_model=GenerationResponse | GenerationListResponse,
    responses={
        200: {
            "description": "The text; with `stream`, `token` events and then `end` or `error`; after `restart` the answer begins anew.",
            "content": sse.EVENT_STREAM_CONTENT,
        },
        **problem_responses(400, 409, 413, 415, 422, 500, 503),
    },
)
async def generate_text(
    body: Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
) -> Any:
    """Pinned to one version when it is admitted: an edit that lands meanwhile does not change it.

    A stream tells `token` events and then `end` or `error`. Should the worker die on the way, another one begins anew:
    a `restart` event says that all tokens so far are void, and the whole answer follows.
    """
    channel = await run_in_threadpool(services.generation.generate, body)
    call = EngineCall("generate", channel, body, services, broker)
    if body.stream:
        return EventStreamResponse(call.events(), call.cancel)
    result = await call.wait_for_result(request)
    if result is None:
        return Response(status_code=499)  # nobody reads it
    if body.prompts is not None:
        return result
    return {**result["choices"][0], **{name: result[name] for name in ("version", "usage", "seconds")}}
