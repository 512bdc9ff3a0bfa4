"""OpenAI's completions and models, for programs that speak to those: any version of the resident model under a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from api import sse
from api.dependencies import Bell, Resource, Work, bearer
from api.engine_calls import Call
from api.openai.completions import CompletionRequest
from api.openai.errors import refusals
from api.openai.streaming import Chunks, Frame, fingerprint
from api.protected_route import Door
from api.sse import EventStream
from service.application.generation import Named

router = APIRouter(prefix="/v1", tags=["openai"], route_class=Door, dependencies=[bearer])

OWNER = "palimpsest"
_OF_DOOR = (401, 403, 429)


class Logprobs(Resource):
    """Of every token, of the model's own distribution: before temperature, `top_p` and `top_k`."""

    tokens: list[str] = Field(description="a part of a character is spelled in bytes: `bytes:\\xe2`")
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None] = Field(
        description="of the most probable tokens, and of the one that was said"
    )
    text_offset: list[int] = Field(description="the character of `text` at which each token begins")


class Choice(Resource):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: str | None


class Usage(Resource):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(Resource):
    """The answers: `n` to the first prompt, then `n` to the next. One version said all of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str = Field(description="the version that spoke, always by its number", examples=["almanac@42"])
    system_fingerprint: str = Field(description="versions that bear the same one have the same weights")
    choices: list[Choice]
    usage: Usage


class ModelObject(Resource):
    """A version of the resident model, under one of its names."""

    id: str
    object: Literal["model"]
    created: int = Field(description="when this version was made")
    owned_by: str
    version: int
    system_fingerprint: str


class ModelList(Resource):
    object: Literal["list"]
    data: list[ModelObject]


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
            "content": sse.DOCUMENTED,
        },
        **refusals(400, *_OF_DOOR, 404, 413, 415, 500, 503),
    },
)
async def complete(
    asked: Annotated[CompletionRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    work: Work,
    broker: Bell,
) -> Any:
    """Goes on with one prompt or several. The name of the model says which version; what it means is settled when the request
    comes in, and an edit that lands meanwhile does not change it."""
    speech = await run_in_threadpool(work.calls.complete, asked.model, asked.speech())
    call = Call("generate", speech.channel, speech.request, work, broker)
    if asked.stream:
        options = asked.stream_options
        chunks = Chunks(speech, options is not None and options.include_usage)
        return EventStream(call.events(), call.hang_up, chunks.frames)
    said = await call.answer(request)
    return Response(status_code=499) if said is None else Frame(speech).whole(said)  # 499: nobody reads it


@router.get("/models", response_model=ModelList, responses=refusals(*_OF_DOOR, 500, 503))
def models(work: Work) -> Any:
    """The names that can be asked for: the model's own and NAME@head for the newest version, NAME@base, and the newest
    versions by number. Older ones can be asked for, too."""
    return {"object": "list", "data": [_shown(named) for named in work.calls.names()]}


@router.get("/models/{id:path}", response_model=ModelObject, responses=refusals(*_OF_DOOR, 404, 500, 503))
def model(
    id: Annotated[str, Path(description="NAME, NAME@head, NAME@base or NAME@42", examples=["almanac@base"])],
    work: Work,
) -> Any:
    """Which version a name means now."""
    return _shown(work.calls.named(id))


def _shown(named: Named) -> dict[str, Any]:
    return {
        "id": named.id,
        "object": "model",
        "created": int(named.created.timestamp()),
        "owned_by": OWNER,
        "version": named.version,
        "system_fingerprint": fingerprint(named),
    }
