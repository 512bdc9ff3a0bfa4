"""Routes that require authorization: API key, rate limit and scope are checked before the body is read and parsed.

A route declares its scope, and what its body is, with `@requires` on its function. A GET route without one needs
`read`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.datastructures import DefaultPlaceholder
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from api.authentication import Principal, authenticate
from api.errors import (
    Forbidden,
    MalformedJson,
    PayloadTooLarge,
    UnsupportedMediaType,
    problem_responses,
)
from api.large_answers import encode_in_thread
from api.large_requests import LargeRequests
from api.received_body import ReceivedBody, receive_body
from service.application.api_keys import Scope, has_scope
from service.kit.large_json import JsonTooLarge, parse_json

BINARY_MEDIA_TYPE = "application/octet-stream"
MAX_INLINE_BODY = 64_000  # bytes; a larger body is parsed and validated in a thread
#: member of an OpenAPI operation that names the scope it needs
SCOPE_EXTENSION = "x-required-scope"

T = TypeVar("T")
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
    """A request whose body has been received, and parsed if it is JSON."""

    def __init__(self, request: Request, body: ReceivedBody, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self.received_body = body
        self._value = value

    async def body(self) -> bytes:
        return b"{}" if self.received_body.size else b""  # FastAPI asks only whether there is one

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
            encode_in_thread(endpoint, self) if _has_response_model(endpoint, options) else endpoint,
            responses={**problem_responses(401, 403, 429), **(responses or {})},
            openapi_extra={SCOPE_EXTENSION: str(self.access_rule.scope), **(openapi_extra or {})},
            **options,
        )

    def get_route_handler(self) -> RouteHandler:
        call_route = super().get_route_handler()
        rule = self.access_rule

        async def handler(request: Request) -> Response:
            await authorize(request, rule.scope)
            if request.method not in ("POST", "PUT", "PATCH"):
                return await call_route(request)
            large: LargeRequests = request.app.state.large_requests
            limit: int = getattr(request.app.state.settings, rule.body.value)
            caller: str = request.state.actor
            async with receive_body(request, limit, partial(large.upload, caller)) as body:
                if not body.is_in_memory:
                    request.state.may_wait = False  # other large requests must not wait until a job ends
                    request.state.run_on_body = large.run
                    async with large.slot(caller):
                        value = await large.run(self._parse_and_validate, request, body)
                        return await call_route(ParsedRequest(request, body, value))
                if body.size > MAX_INLINE_BODY:
                    request.state.run_on_body = partial(large.run_in_slot, caller)
                    value = await run_on_body(request, self._parse_and_validate, request, body)
                else:
                    value = _parse_body(request, body, rule.body) if body.size else None
                return await call_route(ParsedRequest(request, body, value))

        return handler

    def _parse_and_validate(self, request: Request, body: ReceivedBody) -> Any:
        """Return the value of a large body as the route's model. FastAPI, which validates in the event loop, takes a
        model as it is."""
        value = _parse_body(request, body, self.access_rule.body)
        if self.body_field is None or self.access_rule.body is RequestBody.FILE:
            return value
        body.file.close()  # the request can wait long for its answer
        value, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        return value


def _has_response_model(endpoint: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Return whether a route has a response model, from its options or from what its function returns."""
    model = options.get("response_model")
    if isinstance(model, DefaultPlaceholder):
        model = get_type_hints(endpoint).get("return")
    return model not in (None, Any) and not (isinstance(model, type) and issubclass(model, Response))


async def run_on_body(request: Request, function: Callable[..., T], *arguments: Any) -> T:
    """Return the result of a function that works on the body of a request: called in a thread of the pool, or in the
    slot of large requests if the body is large."""
    run: Callable[..., Awaitable[T]] = getattr(request.state, "run_on_body", run_in_threadpool)
    return await run(function, *arguments)


def _parse_body(request: Request, body: ReceivedBody, kind: RequestBody) -> Any:
    """Return the JSON value of a body, or None for a file.

    The `Content-Type` is required because it makes a browser send a preflight request: a web page of another origin
    cannot send JSON to a service on loopback.
    """
    media_type = content_type_of(request)
    if kind is RequestBody.FILE:
        if media_type != BINARY_MEDIA_TYPE:
            raise UnsupportedMediaType(f"Send the file with the header `Content-Type: {BINARY_MEDIA_TYPE}`.")
        return None
    if media_type != "application/json":
        raise UnsupportedMediaType("Send JSON with the header `Content-Type: application/json`.")
    try:
        return parse_json(body.read())
    except JsonTooLarge as error:
        raise PayloadTooLarge(f"The body is too large: {error}. Send less at once.") from None
    except ValueError as error:
        raise MalformedJson(f"The body cannot be read as JSON ({error}): send valid JSON in UTF-8.") from None


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
