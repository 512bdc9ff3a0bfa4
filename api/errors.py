"""Errors as HTTP responses: the table of statuses, and problem documents (RFC 9457, `application/problem+json`).

Paths below /v1 use the error form of OpenAI's API instead (`api/openai/errors.py`). A response never contains a stack
trace, a file path of the server or the message of a driver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.openai import errors as openai
from service.errors import (
    Conflict,
    InternalError,
    InvalidInput,
    NotFound,
    PalimpsestError,
    QueueFull,
    Unavailable,
    error_type,
)
from service.kit import metrics
from service.kit.validation_messages import validation_messages

log = logging.getLogger("palimpsest.api")

MAX_REPORTED_ERRORS = 20  # of one request
PROBLEM_MEDIA_TYPE = "application/problem+json"


class MalformedJson(PalimpsestError):
    """The body is not valid JSON."""

    code = "malformed_json"
    title = "Malformed JSON"


class Unauthorized(PalimpsestError):
    """The API key is missing, unknown or revoked."""

    code = "unauthorized"
    title = "API key required"


class Forbidden(PalimpsestError):
    """The API key does not have the required scope; in development mode, the request is not from this machine."""

    code = "forbidden"
    title = "Forbidden"


class PathNotFound(NotFound):
    """No route has this path."""

    code = "path_not_found"
    title = "Path not found"


class MethodNotAllowed(PalimpsestError):
    """The path does not support this method."""

    code = "method_not_allowed"
    title = "Method not allowed"


class RateLimitExceeded(QueueFull):
    """The API key has exceeded a limit: of requests or tokens per minute, or of open calls and event streams."""

    code = "rate_limit_exceeded"
    title = "Rate limit exceeded"


class TooManyUploads(QueueFull):
    """The caller sends too many large bodies at the same time."""

    code = "too_many_uploads"
    title = "Too many large requests"


class NotAcceptable(PalimpsestError):
    """The resource has none of the media types in the `Accept` header."""

    code = "not_acceptable"
    title = "Not acceptable"


class PayloadTooLarge(PalimpsestError):
    """The body is larger than the limit of the route."""

    code = "payload_too_large"
    title = "Payload too large"


class UnsupportedMediaType(PalimpsestError):
    """The `Content-Type` is not the one that the route reads."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


#: HTTP status by error class. A class that is not listed has the status of its nearest base, else 500.
STATUS_BY_ERROR: dict[type[PalimpsestError], HTTPStatus] = {
    MalformedJson: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    NotAcceptable: HTTPStatus.NOT_ACCEPTABLE,
    Conflict: HTTPStatus.CONFLICT,
    PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}

#: label of the metric `http_rejected_total`, by error class
LIMIT_LABELS: dict[type[PalimpsestError], str] = {
    RateLimitExceeded: "rate",
    QueueFull: "queue",
    PayloadTooLarge: "size",
    TooManyUploads: "uploads",
}

#: description of each status in the OpenAPI document
STATUS_DESCRIPTIONS: dict[int, str] = {
    400: "The body is not valid JSON: a syntax error, NaN or Infinity, text that is not UTF-8, or too many nested levels.",
    401: "The service requires an API key, and the request has no valid one.",
    403: "The API key does not have the required scope. In development mode: the request is not from this machine.",
    404: "No resource has this id.",
    405: "The path does not support this method.",
    406: "The resource has none of the media types in the `Accept` header.",
    409: "The current state of the resource does not allow the operation.",
    413: "The body is larger than the limit. Defaults: 1 MB, 20 MB for records, 200 MB for imports.",
    415: "The `Content-Type` is not `application/json`, or for a file not `application/octet-stream`.",
    422: "The request is well-formed and cannot be carried out. `errors` lists what to change. Nothing was changed.",
    429: "The queue is full, or the API key has exceeded one of its limits. Retry after `Retry-After` seconds.",
    500: "The service failed.",
    503: "A dependency of the service is down or not ready. `detail` says which.",
}

_FRAMEWORK_ERRORS: dict[int, PalimpsestError] = {
    404: PathNotFound("No route has this path: see /docs for the list of routes."),
    405: MethodNotAllowed("This path does not support this method: see /docs for the methods it supports."),
}


class FieldError(BaseModel):
    """A field to change."""

    field: str = Field(examples=["edits.0.prompt"])
    detail: str = Field(examples=["must contain exactly one {} in place of the subject; it has none."])


class Problem(BaseModel):
    """A problem document (RFC 9457). It may have further members."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(
        description="`urn:palimpsest:error:` and the code", examples=["urn:palimpsest:error:not_found"]
    )
    code: str = Field(
        description="stable identifier of the error; docs/errors.md lists all codes", examples=["not_found"]
    )
    title: str = Field(description="summary of the kind of error")
    status: int
    detail: str = Field(description="what happened and what to change")
    instance: str | None = Field(None, description="path of the request")
    errors: list[FieldError] | None = Field(None, description="the fields to change, with status 422")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of these statuses."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    documented: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        documented[status] = {"description": STATUS_DESCRIPTIONS[status], "content": content}
        if status == 429:
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            documented[status]["headers"] = {"Retry-After": seconds}
    return documented


def encode_json(content: Any) -> bytes:
    """Return JSON as valid UTF-8. Lone surrogates are replaced."""
    return json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", errors="replace")


def error_response(
    request: Request,
    error: PalimpsestError,
    status: int | None = None,
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response of an error: a problem document, or OpenAI's form below /v1."""
    status = status_of(error) if status is None else status
    if openai.is_openai_path(request.url.path):
        status, openai_body = openai.error_body(status, error)
        return Response(encode_json(openai_body), status, headers, "application/json")
    body = {**error.extra, **(extra or {})}
    if error.field and not isinstance(error, InvalidInput):  # `errors` names the fields of InvalidInput
        body["field"] = error.field
    body |= {
        "type": error_type(error.code),
        "code": error.code,
        "title": error.title,
        "status": int(status),
        "detail": error.detail,
        "instance": request.url.path,
    }
    return Response(encode_json(body), int(status), headers, PROBLEM_MEDIA_TYPE)


def status_of(error: PalimpsestError) -> HTTPStatus:
    """Return the HTTP status of the nearest class in the table."""
    return status_of_class(type(error))


def status_of_class(error_class: type[PalimpsestError]) -> HTTPStatus:
    """Return the HTTP status of an error class: that of its nearest base in the table, else 500."""
    statuses = (STATUS_BY_ERROR[base] for base in error_class.__mro__ if base in STATUS_BY_ERROR)
    return next(statuses, HTTPStatus.INTERNAL_SERVER_ERROR)


def _handle_domain_error(request: Request, error: PalimpsestError) -> Response:
    extra: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if limit := LIMIT_LABELS.get(type(error)):
        metrics.HTTP_REJECTED.labels(limit).inc()
    if isinstance(error, InvalidInput):
        extra["errors"] = [{"field": error.field, "detail": error.detail}]
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return error_response(request, error, extra=extra, headers=headers)


def _handle_framework_error(request: Request, error: HTTPException) -> Response:
    domain_error = _FRAMEWORK_ERRORS.get(error.status_code) or InvalidInput(str(error.detail))
    return error_response(request, domain_error, error.status_code, headers=error.headers)


def _handle_validation_error(request: Request, error: RequestValidationError) -> Response:
    found = error.errors()
    errors = validation_messages(found[:MAX_REPORTED_ERRORS])
    detail = " ".join(f"`{item['field']}` {item['detail']}" for item in errors[:5])
    more = len(errors) - 5 + len(found[MAX_REPORTED_ERRORS:])
    if more > 0:
        detail += f" And {more} more."
    return error_response(request, InvalidInput(detail, errors[0]["field"]), extra={"errors": errors})


def _handle_dependency_error(request: Request, error: Exception) -> Response:
    name = "database" if isinstance(error, SQLAlchemyError) else "queue"
    log.warning("dependency failed", extra={"dependency": name, "error": type(error).__name__})
    return error_response(
        request, Unavailable(f"The {name} does not respond: try again, and check that it is running.")
    )


def _handle_disconnect(_: Request, __: ClientDisconnect) -> Response:
    """Return what the log and the metrics count for a client that closed the connection while it sent its body."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _handle_unexpected(request: Request, error: Exception) -> Response:
    log.error("request failed", extra={"path": request.url.path, "error": type(error).__name__})
    return error_response(request, InternalError("The service failed. Its log has the details."))


def install_error_handlers(app: FastAPI) -> None:
    """Register the handlers that turn every error of this application into a response of this module."""
    app.add_exception_handler(PalimpsestError, _handle_domain_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _handle_framework_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _handle_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)  # type: ignore[arg-type]
    for error_class in (
        OperationalError,
        InterfaceError,
        PoolTimeout,
        RedisConnectionError,
        RedisTimeoutError,
    ):
        app.add_exception_handler(error_class, _handle_dependency_error)
    app.add_exception_handler(Exception, _handle_unexpected)
