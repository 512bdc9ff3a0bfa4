"""What every request passes before a route sees it: the key, its rate and its scopes, then the body's size, type and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic_core import from_json

from api.authentication import Caller, identify
from api.errors import Forbidden, Malformed, TooLarge, WrongMediaType, problems
from service.application.api_keys import Scope, may
from service.settings import Settings

#: what a key must be good for, by method and path; a GET needs `read`. A route without a scope cannot be made.
SCOPES = {
    ("POST", "/edits"): Scope.EDIT,
    ("POST", "/import"): Scope.EDIT,
    ("DELETE", "/edits/{id}"): Scope.EDIT,
    ("POST", "/trace"): Scope.READ,
    ("DELETE", "/trace/{id}"): Scope.EDIT,
    ("POST", "/evaluations"): Scope.EDIT,
    ("DELETE", "/evaluations/{id}"): Scope.EDIT,
    ("POST", "/generate"): Scope.READ,
    ("POST", "/compare"): Scope.READ,
    ("POST", "/v1/completions"): Scope.READ,
    ("POST", "/jobs/{id}/retry"): Scope.ADMIN,
}

#: routes whose bodies carry records, and may be larger than others
RECORDS = {("POST", "/evaluations")}

#: routes whose bodies are files, and no JSON
FILES = {("POST", "/import")}
BINARY = "application/octet-stream"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Responses = dict[int | str, dict[str, Any]]


class Checked(Request):
    """A request whose body is read and known to be JSON, or empty."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class Door(APIRoute):
    """A route behind the door. The key comes first: a stranger's body is not even read."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, responses: Responses | None = None, **given: Any
    ) -> None:
        at_the_door = problems(401, 403, 429)
        super().__init__(path, endpoint, responses={**at_the_door, **(responses or {})}, **given)

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        needed = {method: scope_of(method, self.path) for method in self.methods or ()}

        async def through_the_door(request: Request) -> Response:
            await admit(request, needed[request.method])
            if request.method in ("POST", "PUT", "PATCH"):
                raw = await read(request, self._most(request))
                request = Checked(request, raw, self._parse(request, raw) if raw else None)
            return await handle(request)

        return through_the_door

    def _most(self, request: Request) -> int:
        """Bytes that a body may have here."""
        settings: Settings = request.app.state.settings
        if (request.method, self.path) in FILES:
            return settings.max_import_body
        return settings.max_records_body if (request.method, self.path) in RECORDS else settings.max_body

    def _parse(self, request: Request, raw: bytes) -> Any:
        """The JSON of a body; nothing of a file, which is declared as one for the same reason (see `parse`)."""
        if (request.method, self.path) not in FILES:
            return parse(request, raw)
        if declared(request) != BINARY:
            raise WrongMediaType(f"Send the file with the header `Content-Type: {BINARY}`.")
        return None


def declared(request: Request) -> str:
    """The type that a body is said to have."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def scope_of(method: str, path: str) -> Scope:
    """The scope that a route needs."""
    if method == "GET":
        return SCOPES.get((method, path), Scope.READ)
    return SCOPES[method, path]


async def admit(request: Request, needed: Scope) -> None:
    """Let a caller in who is known, in time and allowed; `request.state` then says who it is."""
    caller = await identify(request)
    request.state.actor, request.state.limits = caller.actor, caller.limits
    if caller.limits.requests_per_minute is not None:
        rate = request.app.state.rate
        await run_in_threadpool(rate.count, caller.actor, caller.limits.requests_per_minute)
    _check_scope(caller, needed)


def _check_scope(caller: Caller, needed: Scope) -> None:
    if not may(caller.scopes, needed):
        held = ", ".join(sorted(caller.scopes))
        raise Forbidden(f"This needs a key with the scope `{needed}`; the one that was sent has: {held}.")


async def read(request: Request, limit: int) -> bytes:
    """The body, as long as it is not too large."""
    too_large = TooLarge(f"The body is larger than {limit} bytes: send less at once.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 12 or int(length) > limit):
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def parse(request: Request, raw: bytes) -> Any:
    """The JSON of a body; stricter than Python's own parser, which takes NaN and lone surrogates.

    The declared type is insisted on because a browser asks before it sends JSON to another origin: no web page can
    speak to a service on loopback behind its user's back.
    """
    if declared(request) != "application/json":
        raise WrongMediaType("Send JSON with the header `Content-Type: application/json`.")
    try:
        value = from_json(raw, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is a number in JSON and infinite here
    except ValueError as error:
        raise Malformed(f"The body cannot be read as JSON ({error}): send valid JSON in UTF-8.") from None
    return value
