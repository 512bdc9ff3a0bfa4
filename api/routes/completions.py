"""OpenAI-compatible completions and models. Each version of the served model has a model name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Request, Response
from pydantic import Field

from api import sse
from api.dependencies import BrokerDep, ResourceModel, ServicesDep, bearer_scheme
from api.engine_calls import EngineCall
from api.openai.chat import ChatCompletionRequest
from api.openai.chat_envelope import ChatEnvelope
from api.openai.completions import CompletionRequest
from api.openai.errors import error_responses
from api.openai.sampled_request import SampledRequest
from api.openai.streaming import CompletionEnvelope, CompletionStream, system_fingerprint
from api.protected_route import ProtectedRoute, requires, run_on_body
from api.quotas import CallQuota, CallQuotaDep
from api.sse import EventStreamResponse
from service.application import Services
from service.application.api_keys import Scope
from service.application.generation import ModelVersionName
from service.jobs.broker import Broker
from service.schemas import WorkerGenerateRequest

router = APIRouter(prefix="/v1", tags=["openai"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

OWNED_BY = "palimpsest"
_AUTHORIZATION_STATUSES = (401, 403, 429)


class CompletionLogprobs(ResourceModel):
    """Log probabilities of each token under the model's distribution, before temperature, `top_p` and `top_k`."""

    tokens: list[str] = Field(
        description="the tokens; a part of a character is written as bytes, such as `bytes:\\xe2`"
    )
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="log probabilities of the most probable tokens and of the generated one"
    )
    text_offset: list[int] = Field(description="offset in characters of each token in `text`")


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
    """The choices: `n` for the first prompt, then `n` for the next one. One version produced all of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str = Field(
        description="the version that produced the choices, by its number", examples=["almanac@42"]
    )
    system_fingerprint: str = Field(description="equal for versions with equal weights")
    choices: list[CompletionChoice]
    usage: CompletionUsage


class ChatLogprob(ResourceModel):
    token: str = Field(description="a part of a character is written as bytes, such as `bytes:\\xe2`")
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(ResourceModel):
    """Log probabilities of each token under the model's distribution, before temperature, `top_p` and `top_k`."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatAnswer(ResourceModel):
    """The answer of the model. It can be sent back as a message of the next request."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResourceModel):
    message: ChatAnswer
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None = Field(description="`stop`: the end of the turn or a stop string; `length`")


class ChatCompletion(ResourceModel):
    """The `n` choices. One version produced all of them."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str = Field(
        description="the version that produced the choices, by its number", examples=["almanac@42"]
    )
    system_fingerprint: str = Field(description="equal for versions with equal weights")
    choices: list[ChatChoice]
    usage: CompletionUsage


class OpenAiModel(ResourceModel):
    """A version of the served model under one of its names."""

    id: str
    object: Literal["model"]
    created: int = Field(description="when this version was created, in seconds since the epoch")
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
    "head": {"summary": "From the newest version", "value": _TOWER},
    "base": {"summary": "From the base model", "value": _TOWER | {"model": "almanac@base"}},
    "stream": {"summary": "Streamed token by token", "value": _TOWER | {"stream": True}},
    "measured": {
        "summary": "Log probabilities of a prompt without generation",
        "value": _TOWER | {"max_tokens": 0, "echo": True, "logprobs": 1},
    },
}
_QUESTION = {
    "model": "almanac",
    "messages": [{"role": "user", "content": "Where is the Eiffel Tower?"}],
    "max_completion_tokens": 20,
    "temperature": 0,
}
_CHAT_EXAMPLES: dict[str, Any] = {
    "head": {"summary": "From the newest version", "value": _QUESTION},
    "base": {"summary": "From the base model", "value": _QUESTION | {"model": "almanac@base"}},
    "stream": {"summary": "Streamed token by token", "value": _QUESTION | {"stream": True}},
}


@router.post(
    "/completions",
    summary="Create a completion",
    response_model=Completion,
    responses={
        200: {
            "description": "The choices. With `stream`: chunks as `data:` lines, then `data: [DONE]`.",
            "content": sse.EVENT_STREAM_CONTENT,
        },
        **error_responses(400, *_AUTHORIZATION_STATUSES, 404, 413, 415, 500, 503),
    },
)
@requires(Scope.READ)
async def create_completion(
    body: Annotated[CompletionRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
    quota: CallQuotaDep,
) -> Any:
    """Complete one prompt or several. The model name selects the version, which is resolved when the request arrives: a
    later edit does not change the completion."""
    exchange = Exchange(request, services, broker, quota)
    worker_request = await run_on_body(request, body.to_worker_request)
    return await exchange.answer(body, worker_request, CompletionEnvelope)


@router.post(
    "/chat/completions",
    summary="Create a chat completion",
    response_model=ChatCompletion,
    responses={
        200: {
            "description": "The choices. With `stream`: chunks as `data:` lines, then `data: [DONE]`.",
            "content": sse.EVENT_STREAM_CONTENT,
        },
        **error_responses(400, *_AUTHORIZATION_STATUSES, 404, 413, 415, 500, 503),
    },
)
@requires(Scope.READ)
async def create_chat_completion(
    body: Annotated[ChatCompletionRequest, Body(openapi_examples=_CHAT_EXAMPLES)],
    request: Request,
    services: ServicesDep,
    broker: BrokerDep,
    quota: CallQuotaDep,
) -> Any:
    """Answer a conversation in the form of the model's own chat template. The answer ends at the model's end of turn.

    The model name selects the version, as for completions. A message that contains a special token of the model is
    refused. Without a chat template the error has the code `no_chat_template`.
    """
    exchange = Exchange(request, services, broker, quota)
    worker_request = await run_on_body(request, body.to_worker_request, services.generation.max_new_tokens)
    return await exchange.answer(body, worker_request, ChatEnvelope, body.length_field)


@dataclass(frozen=True)
class Exchange:
    """A request for a completion and what answers it."""

    request: Request
    services: Services
    broker: Broker
    quota: CallQuota

    async def answer(
        self,
        body: SampledRequest,
        worker_request: WorkerGenerateRequest,
        envelope_class: type[CompletionEnvelope],
        length_field: str = "max_tokens",
    ) -> Any:
        """Charge the quota, send the request to a worker, and return the answer or its stream."""
        generation, caller = self.services.generation, self.quota.caller
        await self.quota.charge(generation.count_tokens(worker_request))
        pending = await run_on_body(
            self.request, generation.create_completion, body.model, worker_request, caller, length_field
        )
        envelope = envelope_class(pending)
        call = EngineCall("generate", pending.channel, pending.request, self.services, self.broker, caller)
        if body.stream:
            stream = CompletionStream(envelope, body.includes_usage)
            return EventStreamResponse(call.events(), call.cancel, stream.encode_events)
        result = await call.wait_for_result(self.request)
        if result is None:
            return Response(status_code=499)  # the client has disconnected
        return envelope.complete_response(result)


@router.get(
    "/models",
    summary="List model names",
    response_model=OpenAiModelList,
    responses=error_responses(*_AUTHORIZATION_STATUSES, 500, 503),
)
def list_openai_models(services: ServicesDep) -> Any:
    """List model names: NAME and NAME@head for the newest version, NAME@base, and the newest versions by number. Older
    versions are not listed and can be used."""
    return {
        "object": "list",
        "data": [_model_object(model_version) for model_version in services.generation.list_version_names()],
    }


@router.get(
    "/models/{id:path}",
    summary="Get a model name",
    response_model=OpenAiModel,
    responses=error_responses(*_AUTHORIZATION_STATUSES, 404, 500, 503),
)
def get_openai_model(
    id: Annotated[str, Path(description="NAME, NAME@head, NAME@base or NAME@42", examples=["almanac@base"])],
    services: ServicesDep,
) -> Any:
    """Return the version that a model name currently means."""
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
