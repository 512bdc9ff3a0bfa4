"""Generation: let the model speak, at any version."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool

from api import sse
from api.dependencies import Bell, Resource, Work, bearer
from api.engine_calls import Call
from api.errors import problems
from api.protected_route import Door
from api.sse import EventStream
from service.schemas import GenerateRequest

router = APIRouter(tags=["generation"], route_class=Door, dependencies=[bearer])


class Usage(Resource):
    prompt_tokens: int
    completion_tokens: int


class Choice(Resource):
    text: str
    tokens: list[int]
    finish_reason: str


class Generated(Choice):
    """The answer to `prompt`. `version` is the one that produced every token of it."""

    version: int
    usage: Usage
    seconds: float


class GeneratedMany(Resource):
    """The answer to `prompts`, in their order."""

    choices: list[Choice]
    version: int
    usage: Usage
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
    response_model=Generated | GeneratedMany,
    responses={
        200: {
            "description": "The text; with `stream`, `token` events and then `end` or `error`; after `restart` the answer begins anew.",
            "content": sse.DOCUMENTED,
        },
        **problems(400, 409, 413, 415, 422, 500, 503),
    },
)
async def generate(
    asked: Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)],
    request: Request,
    work: Work,
    broker: Bell,
) -> Any:
    """Pinned to one version when it is admitted: an edit that lands meanwhile does not change it.

    A stream tells `token` events and then `end` or `error`. Should the worker die on the way, another one begins anew:
    a `restart` event says that all tokens so far are void, and the whole answer follows.
    """
    channel = await run_in_threadpool(work.calls.generate, asked)
    call = Call("generate", channel, asked, work, broker)
    if asked.stream:
        return EventStream(call.events(), call.hang_up)
    said = await call.answer(request)
    if said is None:
        return Response(status_code=499)  # nobody reads it
    if asked.prompts is not None:
        return said
    return {**said["choices"][0], **{name: said[name] for name in ("version", "usage", "seconds")}}
