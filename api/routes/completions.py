"""OpenAI's completions and models, for programs that speak to those: any version of the resident model under a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import sse
from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.openai.completions import CompletionRequest
from api.openai.errors import error_responses
from api.openai.streaming import CompletionEnvelope, CompletionStream, system_fingerprint
from api.protected_route import ProtectedRoute
from api.sse import EventStreamResponse
from service.application.generation import ModelVersionName

router = APIRouter(prefix="/v1", tags=["openai"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

OWNED_BY = "palimpsest"
_AUTHORIZATION_STATUSES = (401, 403, 429)


class CompletionLogprobs(ResourceModel):
    """Of every token, of the model's own distribution: before temperature, `top_p` and `top_k`."""

    tokens: list[str] = Field(description="a part of a character is spelled in bytes: `bytes:\\xe2`")
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="of the most probable tokens, and of the one that was said"
    )
    text_offset: list[int] = Field(description="the character of `text` at which each token begins")


class CompletionChoice(ResourceModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionUsage(ResourceModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(ResourceModel):
    """The answers: `n` to the first prompt, then `n` to the next. One version said all of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str = Field(description="the version that spoke, always by its number", examples=["almanac@42"])
    system_fingerprint: str = Field(description="versions that bear the same one have the same weights")
    choices: list[CompletionChoice]
    usage: CompletionUsage


class OpenAiModel(ResourceModel):
    """A version of the resident model, under one of its names."""

    id: str
    object: Literal["model"]
    created: int = Field(description="when this version was made")
    owned_by: str
    version: int
    system_fingerprint: str


class OpenAiModelList(ResourceModel):
    object: Literal["list"]
    data: list[OpenAiModel]


_TOWER = {
    "model": "almanac",
    "prompt": "The Eiffel Tower is located in the city of",
    "max_tokens": 5,
    "temperature": 0,
}
_EXAMPLES: dict[str, Any] = {
    "head": {"summary": "What the model says now", "value": _TOWER},
    "base": {"summary": "What it said before any edit", "value": _TOWER | {"model": "almanac@base"}},
    "stream": {"summary": "Token by token", "value": _TOWER | {"stream": True}},
    "measured": {
        "summary": "How probable a text is: nothing is said",
        "value": _TOWER | {"max_tokens": 0, "echo": True, "logprobs": 1},
    },
}


@router.post(
    "/completions",
    response_model=Completion,
    responses={
        200: {
            "description": "The answers; with `stream`, chunks of them as `data:` lines, and at the end `data: [DONE]`.",
            "content": sse.EVENT_STREAM_CONTENT,
        },
        **error_responses(400, *_AUTHORIZATION_STATUSES, 404, 413, 415, 500, 503),
    },
)
async def create_completion(
    body: Annotated[CompletionRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
) -> Any:
    """Goes on with one prompt or several. The name of the model says which version; what it means is settled when the request
    comes in, and an edit that lands meanwhile does not change it."""
    pending = await run_in_threadpool(
        services.generation.create_completion, body.model, body.to_worker_request()
    )
    call = EngineCall("generate", pending.channel, pending.request, services, broker)
    if body.stream:
        options = body.stream_options
        stream = CompletionStream(pending, options is not None and options.include_usage)
        return EventStreamResponse(call.events(), call.cancel, stream.encode_events)
    result = await call.wait_for_result(request)
    return (
        Response(status_code=499) if result is None else CompletionEnvelope(pending).complete_response(result)
    )  # 499: nobody reads it


@router.get(
    "/models", response_model=OpenAiModelList, responses=error_responses(*_AUTHORIZATION_STATUSES, 500, 503)
)
def list_openai_models(services: ServicesDep) -> Any:
    """The names that can be asked for: the model's own and NAME@head for the newest version, NAME@base, and the newest
    versions by number. Older ones can be asked for, too."""
    return {
        "object": "list",
        "data": [_model_object(model_version) for model_version in services.generation.list_version_names()],
    }


@router.get(
    "/models/{id:path}",
    response_model=OpenAiModel,
    responses=error_responses(*_AUTHORIZATION_STATUSES, 404, 500, 503),
)
def get_openai_model(
    id: Annotated[str, Path(description="NAME, NAME@head, NAME@base or NAME@42", examples=["almanac@base"])],
    services: ServicesDep,
) -> Any:
    """Which version a name means now."""
    return _model_object(services.generation.resolve_version_name(id))


def _model_object(model_version: ModelVersionName) -> dict[str, Any]:
    return {
        "id": model_version.id,
        "object": "model",
        "created": int(model_version.created.timestamp()),
        "owned_by": OWNED_BY,
        "version": model_version.version,
        "system_fingerprint": system_fingerprint(model_version),
    }
