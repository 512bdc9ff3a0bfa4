"""Routes that require authorization: API key, rate limit and scope are checked before the body is read and parsed.

A route declares its scope, and what its body is, with `@requires` on its function. A GET route without one needs
`read`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json

from api.authentication import Principal, authenticate
from api.errors import Forbidden, MalformedJson, PayloadTooLarge, UnsupportedMediaType, problem_responses
from service.application.api_keys import Scope, has_scope
from service.settings import Settings

BINARY_MEDIA_TYPE = "application/octet-stream"
MAX_INLINE_BODY = 64_000  # bytes; a larger body is parsed and validated in a thread
#: what a number has that can exceed a float or the digits of an integer
HUGE_NUMBER = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{300}")
#: member of an OpenAPI operation that names the scope it needs
SCOPE_EXTENSION = "x-required-scope"

RouteHandler = Callable[[Request], Coroutine[Any, Any, Response]]
ResponseDocs = dict[int | str, dict[str, Any]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class RequestBody(Enum):
    """What the body of a route is. The value is the setting with its size limit in bytes."""

    JSON = "max_body"
    RECORDS = "max_records_body"  #: JSON with evaluation records
    FILE = "max_import_body"  #: a file, sent as application/octet-stream


@dataclass(frozen=True)
class AccessRule:
    """The scope that a route needs, and its body."""

    scope: Scope
    body: RequestBody = RequestBody.JSON


def requires(scope: Scope, body: RequestBody = RequestBody.JSON) -> Callable[[Endpoint], Endpoint]:
    """Declare the scope and the body of a route. Apply it to the function, below the decorator of the router."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.access_rule = AccessRule(scope, body)  # type: ignore[attr-defined]
        return endpoint

    return declare


class ParsedRequest(Request):
    """A request whose body has been read, and parsed if it is JSON."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class ProtectedRoute(APIRoute):
    """A route that checks the API key before it reads the body."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        responses: ResponseDocs | None = None,
        openapi_extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        rule = getattr(endpoint, "access_rule", None)
        if rule is None and set(options.get("methods") or ["GET"]) != {"GET"}:
            raise TypeError(f"{path}: declare the scope of {endpoint.__name__} with @requires")
        self.access_rule: AccessRule = rule or AccessRule(Scope.READ)
        super().__init__(
            path,
            endpoint,
            responses={**problem_responses(401, 403, 429), **(responses or {})},
            openapi_extra={SCOPE_EXTENSION: str(self.access_rule.scope), **(openapi_extra or {})},
            **options,
        )

    def get_route_handler(self) -> RouteHandler:
        call_route = super().get_route_handler()
        rule = self.access_rule

        async def handler(request: Request) -> Response:
            await authorize(request, rule.scope)
            if request.method in ("POST", "PUT", "PATCH"):
                settings: Settings = request.app.state.settings
                raw = await read_body(request, getattr(settings, rule.body.value))
                if len(raw) > MAX_INLINE_BODY:
                    value = await run_in_threadpool(self._parse_and_validate, request, raw)
                else:
                    value = _parse_body(request, raw, rule.body) if raw else None
                request = ParsedRequest(request, raw, value)
            return await call_route(request)

        return handler

    def _parse_and_validate(self, request: Request, raw: bytes) -> Any:
        """Return the value of a large body as the route's model. FastAPI, which validates in the event loop, takes a
        model as it is."""
        value = _parse_body(request, raw, self.access_rule.body)
        if self.body_field is None or self.access_rule.body is RequestBody.FILE:
            return value
        value, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        return value


def _parse_body(request: Request, raw: bytes, body: RequestBody) -> Any:
    """Return the JSON value of a body, or None for a file, which must be declared as one (see `parse_json`)."""
    if body is not RequestBody.FILE:
        return parse_json(request, raw)
    if content_type_of(request) != BINARY_MEDIA_TYPE:
        raise UnsupportedMediaType(f"Send the file with the header `Content-Type: {BINARY_MEDIA_TYPE}`.")
    return None


def content_type_of(request: Request) -> str:
    """Return the media type of the body without parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def authorize(request: Request, scope: Scope) -> None:
    """Authenticate the caller and check its rate limit and scope. Sets `actor` and `limits` of `request.state`."""
    principal = await authenticate(request)
    request.state.actor, request.state.limits = principal.actor, principal.limits
    if principal.limits.requests_per_minute is not None:
        rate_limiter = request.app.state.rate_limiter
        await run_in_threadpool(rate_limiter.check, principal.actor, principal.limits.requests_per_minute)
    _check_scope(principal, scope)


def _check_scope(principal: Principal, scope: Scope) -> None:
    if not has_scope(principal.scopes, scope):
        granted = ", ".join(sorted(principal.scopes))
        raise Forbidden(f"This request needs an API key with the scope `{scope}`; the key has: {granted}.")


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises PayloadTooLarge as soon as it exceeds `limit` bytes."""
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
    """Return the JSON value of a body. Rejects NaN, Infinity and lone surrogates, which Python's parser accepts.

    The `Content-Type` is required because it makes a browser send a preflight request: a web page of another origin
    cannot send JSON to a service on loopback.
    """
    if content_type_of(request) != "application/json":
        raise UnsupportedMediaType("Send JSON with the header `Content-Type: application/json`.")
    try:
        value = from_json(raw, allow_inf_nan=False)
        if HUGE_NUMBER.search(raw):
            json.dumps(value, allow_nan=False)  # 1e999 is valid JSON and becomes infinity
    except ValueError as error:
        raise MalformedJson(f"The body cannot be read as JSON ({error}): send valid JSON in UTF-8.") from None
    return value
