"""What every request passes before a route sees it: the key, its rate and its scopes, then the body's size, type and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic_core import from_json

from api.authentication import Principal, authenticate
from api.errors import Forbidden, MalformedJson, PayloadTooLarge, UnsupportedMediaType, problem_responses
from service.application.api_keys import Scope, has_scope
from service.settings import Settings

#: what a key must be good for, by method and path; a GET needs `read`. A route without a scope cannot be made.
ROUTE_SCOPES = {
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
RECORD_ROUTES = {("POST", "/evaluations")}

#: routes whose bodies are files, and no JSON
FILE_ROUTES = {("POST", "/import")}
BINARY_MEDIA_TYPE = "application/octet-stream"

RouteHandler = Callable[[Request], Coroutine[Any, Any, Response]]
ResponseDocs = dict[int | str, dict[str, Any]]


class ParsedRequest(Request):
    """A request whose body is read and known to be JSON, or empty."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class ProtectedRoute(APIRoute):
    """A route behind the door. The key comes first: a stranger's body is not even read."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        responses: ResponseDocs | None = None,
        **options: Any,
    ) -> None:
        authorization_problems = problem_responses(401, 403, 429)
        super().__init__(path, endpoint, responses={**authorization_problems, **(responses or {})}, **options)

    def get_route_handler(self) -> RouteHandler:
        call_route = super().get_route_handler()
        scope_by_method = {method: required_scope(method, self.path) for method in self.methods or ()}

        async def handler(request: Request) -> Response:
            await authorize(request, scope_by_method[request.method])
            if request.method in ("POST", "PUT", "PATCH"):
                raw = await read_body(request, self._max_body_bytes(request))
                request = ParsedRequest(request, raw, self._parse_body(request, raw) if raw else None)
            return await call_route(request)

        return handler

    def _max_body_bytes(self, request: Request) -> int:
        """Bytes that a body may have here."""
        settings: Settings = request.app.state.settings
        if (request.method, self.path) in FILE_ROUTES:
            return settings.max_import_body
        return (
            settings.max_records_body if (request.method, self.path) in RECORD_ROUTES else settings.max_body
        )

    def _parse_body(self, request: Request, raw: bytes) -> Any:
        """The JSON of a body; nothing of a file, which is declared as one for the same reason (see `parse`)."""
        if (request.method, self.path) not in FILE_ROUTES:
            return parse_json(request, raw)
        if content_type_of(request) != BINARY_MEDIA_TYPE:
            raise UnsupportedMediaType(f"Send the file with the header `Content-Type: {BINARY_MEDIA_TYPE}`.")
        return None


def content_type_of(request: Request) -> str:
    """The type that a body is said to have."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def required_scope(method: str, path: str) -> Scope:
    """The scope that a route needs."""
    if method == "GET":
        return ROUTE_SCOPES.get((method, path), Scope.READ)
    return ROUTE_SCOPES[method, path]


async def authorize(request: Request, scope: Scope) -> None:
    """Let a caller in who is known, in time and allowed; `request.state` then says who it is."""
    principal = await authenticate(request)
    request.state.actor, request.state.limits = principal.actor, principal.limits
    if principal.limits.requests_per_minute is not None:
        rate_limiter = request.app.state.rate_limiter
        await run_in_threadpool(rate_limiter.check, principal.actor, principal.limits.requests_per_minute)
    _check_scope(principal, scope)


def _check_scope(principal: Principal, scope: Scope) -> None:
    if not has_scope(principal.scopes, scope):
        granted = ", ".join(sorted(principal.scopes))
        raise Forbidden(f"This needs a key with the scope `{scope}`; the one that was sent has: {granted}.")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, as long as it is not too large."""
    too_large = PayloadTooLarge(f"The body is larger than {limit} bytes: send less at once.")
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


def parse_json(request: Request, raw: bytes) -> Any:
    """The JSON of a body; stricter than Python's own parser, which takes NaN and lone surrogates.

    The declared type is insisted on because a browser asks before it sends JSON to another origin: no web page can
    speak to a service on loopback behind its user's back.
    """
    if content_type_of(request) != "application/json":
        raise UnsupportedMediaType("Send JSON with the header `Content-Type: application/json`.")
    try:
        value = from_json(raw, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is a number in JSON and infinite here
    except ValueError as error:
        raise MalformedJson(f"The body cannot be read as JSON ({error}): send valid JSON in UTF-8.") from None
    return value
