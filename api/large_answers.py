"""Large answers are validated and encoded in a thread, one at a time: FastAPI does both in the event loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import wraps
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool

from api.large_requests import LargeRequests

MAX_INLINE_SIZE = 20_000  #: of an answer that is encoded in the event loop, as `is_large` counts
_VALUE_SIZE = 10  # what a value counts besides its characters


class AnsweringRoute(Protocol):
    """What is needed of a route: its path, the field of its response model, and its status."""

    path: str
    response_field: Any
    status_code: int | None


def encode_in_thread(endpoint: Callable[..., Any], route: AnsweringRoute) -> Callable[..., Any]:
    """Return the endpoint as one that returns a large answer encoded, as the response model of the route."""
    signature = inspect.signature(endpoint)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind)
        for name, kind in (("request", Request), ("response", Response))
        if name not in signature.parameters
    ]
    is_coroutine = inspect.iscoroutinefunction(endpoint)

    @wraps(endpoint)
    async def answer(**values: Any) -> Any:
        request, response = values["request"], values["response"]
        for parameter in added:
            del values[parameter.name]
        large: LargeRequests = request.app.state.large_requests
        async with AsyncExitStack() as stack:
            request.state.enter_answer_slot = lambda: stack.enter_async_context(
                large.answer_slot(route.path, request.state.actor)
            )
            if is_coroutine:
                content = await endpoint(**values)
            else:
                await enter_answer_slot(request)
                content = await run_in_threadpool(endpoint, **values)
            if isinstance(content, Response) or not is_large(content):
                return content
            async with large.encoding:
                encoded = await run_in_threadpool(_encode, route, content)
        status = response.status_code or route.status_code or 200
        headers = {name: value for name, value in response.headers.items() if name != "content-length"}
        return Response(encoded, status, headers, "application/json")

    answer.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    return answer


async def enter_answer_slot(request: Request) -> None:
    """Wait for a slot to read the answer, which is held until the answer is encoded. A function that is not `async`
    has it from the beginning."""
    await request.state.enter_answer_slot()


def is_large(value: Any) -> bool:
    """Return whether a value is large. Stops counting when it is."""
    size, waiting = 0, [value]
    while waiting and size <= MAX_INLINE_SIZE:
        one = waiting.pop()
        size += _VALUE_SIZE
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, dict):
            size += _VALUE_SIZE * len(one)
            if size <= MAX_INLINE_SIZE:
                waiting += one.values()
        elif isinstance(one, list | tuple):
            size += _VALUE_SIZE * len(one)
            if size <= MAX_INLINE_SIZE:
                waiting += one
        elif hasattr(one, "__dict__"):
            waiting += vars(one).values()
    return size > MAX_INLINE_SIZE


def _encode(route: AnsweringRoute, content: Any) -> bytes:
    value, errors = route.response_field.validate(content, {}, loc=("response",))
    if errors:
        raise ValueError(f"the answer is not as documented: {errors[:5]}")
    encoded: bytes = route.response_field.serialize_json(value)
    return encoded
