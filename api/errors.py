"""What goes wrong, as HTTP: one table from errors to statuses, and one form, RFC 9457 `application/problem+json`.

Below /v1 the form is OpenAI's (`api/openai/errors.py`). An error says what to change. It never holds a stack trace, a path of this
machine or the words of a driver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
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

from api.openai import errors as openai
from service.errors import Conflict, InvalidInput, NotFound, PalimpsestError, QueueFull, Unavailable
from service.kit import metrics

log = logging.getLogger("palimpsest.api")

PROBLEM_MEDIA_TYPE = "application/problem+json"


class MalformedJson(PalimpsestError):
    """The body is no JSON."""

    title = "The body is not JSON"


class Unauthorized(PalimpsestError):
    """The bearer key is missing, wrong or revoked."""

    title = "A key is needed"


class Forbidden(PalimpsestError):
    """Who asks is known, and may not do this."""

    title = "This is not allowed"


class TooManyRequests(QueueFull):
    """The key has used up its requests of this minute."""

    title = "Too many requests"


class NotAcceptable(PalimpsestError):
    """The resource has none of the forms that `Accept` asks for."""

    title = "There is no such form of this"


class PayloadTooLarge(PalimpsestError):
    """The body is larger than this service reads."""

    title = "The body is too large"


class UnsupportedMediaType(PalimpsestError):
    """The body is not declared to be JSON."""

    title = "The body must be JSON"


class WorkerFailure(PalimpsestError):
    """A worker met an error that is not the user's doing."""

    title = "The work failed"


#: the one table; an error that is not in it is a 500
STATUS_BY_ERROR: dict[type[PalimpsestError], HTTPStatus] = {
    MalformedJson: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    NotAcceptable: HTTPStatus.NOT_ACCEPTABLE,
    Conflict: HTTPStatus.CONFLICT,
    PayloadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    WorkerFailure: HTTPStatus.INTERNAL_SERVER_ERROR,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}

#: the limits that refuse, as the metrics call them
LIMIT_LABELS: dict[type[PalimpsestError], str] = {
    TooManyRequests: "rate",
    QueueFull: "queue",
    PayloadTooLarge: "size",
}

#: what each status means here, for the OpenAPI document
STATUS_DESCRIPTIONS: dict[int, str] = {
    400: "The body is not JSON: broken syntax, NaN or Infinity, text that is not UTF-8, or nested too deeply.",
    401: "The service asks for a key, and the request carries none that is good.",
    403: "The key has not the scope that this needs; or, where no key is needed, `Host` is no name of this machine.",
    404: "No resource has this id.",
    406: "The resource has none of the forms that `Accept` asks for.",
    409: "The state of the resource forbids this.",
    413: "The body is larger than the service reads: 1 MB, 20 MB of records, 200 MB of edits, where nothing else is set.",
    415: "The body is not declared as `application/json`, or a file not as `application/octet-stream`.",
    422: "Something in the request cannot be carried out; `errors` says what to change. Nothing else happened.",
    429: "Too much is waiting, or the key has sent too many requests; try again after `Retry-After` seconds.",
    500: "A fault of the service.",
    503: "Something that the service depends on is down or not ready; `detail` says what.",
}

_FRAMEWORK_DETAIL: dict[int, str] = {
    404: "Nothing is served at this path: see /docs for the paths there are.",
    405: "This path does not answer this method: see /docs for those it does.",
}


class FieldError(BaseModel):
    """One thing to change."""

    field: str = Field(examples=["edits.0.prompt"])
    detail: str = Field(examples=["must contain exactly one {} in place of the subject; it has none."])


class Problem(BaseModel):
    """An error in the form of RFC 9457. Further members may say more."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", description="always about:blank: `status` and `title` name the kind")
    title: str
    status: int
    detail: str = Field(description="what happened and what to change")
    instance: str | None = Field(None, description="the path that was asked for")
    errors: list[FieldError] | None = Field(None, description="each thing to change; with 422")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these statuses for a route."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    documented: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        documented[status] = {"description": STATUS_DESCRIPTIONS[status], "content": content}
        if status == 429:
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            documented[status]["headers"] = {"Retry-After": seconds}
    return documented


def encode_json(content: Any) -> bytes:
    """JSON that is always UTF-8, whatever text is in it."""
    return json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", errors="replace")


def problem_response(
    request: Request,
    status: int,
    title: str,
    detail: str,
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that tells a person what went wrong."""
    if openai.is_openai_path(request.url.path):
        status, openai_body = openai.error_body(status, detail, extra or {})
        return Response(encode_json(openai_body), status, headers, "application/json")
    body = dict(extra or {}) | {
        "type": "about:blank",
        "title": title,
        "status": int(status),
        "detail": detail,
        "instance": request.url.path,
    }
    return Response(encode_json(body), int(status), headers, PROBLEM_MEDIA_TYPE)


def status_of(error: PalimpsestError) -> HTTPStatus:
    """The status of the nearest class in the table."""
    statuses = (STATUS_BY_ERROR[kind] for kind in type(error).__mro__ if kind in STATUS_BY_ERROR)
    return next(statuses, HTTPStatus.INTERNAL_SERVER_ERROR)


def error_from_event(data: Mapping[str, Any]) -> PalimpsestError:
    """The error that a worker published, told by its title; an unknown one is the service's own fault."""
    detail = str(data.get("detail") or "The worker said no more.")
    for kind in STATUS_BY_ERROR:
        if kind.title == data.get("title"):
            return kind(detail)
    return WorkerFailure(detail)


def _handle_domain_error(request: Request, error: PalimpsestError) -> Response:
    extra = dict(error.extra)
    headers: dict[str, str] = {}
    if limit := LIMIT_LABELS.get(type(error)):
        metrics.HTTP_REJECTED.labels(limit).inc()
    if isinstance(error, InvalidInput):
        extra["errors"] = [{"field": error.field, "detail": error.detail}]
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return problem_response(request, status_of(error), error.title, error.detail, extra, headers)


def _handle_framework_error(request: Request, error: HTTPException) -> Response:
    title = HTTPStatus(error.status_code).phrase
    detail = _FRAMEWORK_DETAIL.get(error.status_code, str(error.detail))
    return problem_response(request, error.status_code, title, detail, headers=error.headers)


def _handle_validation_error(request: Request, error: RequestValidationError) -> Response:
    errors = humanize_validation_errors(error.errors())
    detail = " ".join(f"`{item['field']}` {item['detail']}" for item in errors[:5])
    more = len(errors) - 5
    if more > 0:
        detail += f" And {more} more."
    return problem_response(request, 422, InvalidInput.title, detail, {"errors": errors})


def _handle_dependency_error(request: Request, error: Exception) -> Response:
    name = "database" if isinstance(error, SQLAlchemyError) else "queue"
    log.warning("dependency failed", extra={"dependency": name, "error": type(error).__name__})
    detail = f"The {name} does not answer: try again; if it goes on, see that it runs."
    return problem_response(request, 503, Unavailable.title, detail)


def _handle_unexpected(request: Request, error: Exception) -> Response:
    log.error("request failed", extra={"path": request.url.path, "error": type(error).__name__})
    detail = "A fault of the service, not of the request. Its log has the particulars."
    return problem_response(request, 500, "The service failed", detail)


#: words of pydantic that would puzzle a user, by the kind of error
_MESSAGES_BY_TYPE = {
    "missing": "is missing: add it.",
    "extra_forbidden": "is not known here: remove it or check its spelling.",
    "json_invalid": "is not JSON.",
    "model_type": "must be a JSON object.",
    "model_attributes_type": "must be a JSON object.",
    "dict_type": "must be a JSON object.",
    "string_type": "must be a text.",
    "string_unicode": "contains a NUL or a lone surrogate: remove it.",
    "list_type": "must be a list.",
    "tuple_type": "must be a list.",
    "int_type": "must be a whole number.",
    "int_parsing": "must be a whole number.",
    "int_parsing_size": "must be a whole number of at most 4300 digits.",
    "int_from_float": "must be a whole number.",
    "float_type": "must be a number.",
    "float_parsing": "must be a number.",
    "finite_number": "must be a finite number.",
    "bool_type": "must be true or false.",
    "bool_parsing": "must be true or false.",
}


def humanize_validation_errors(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Pydantic's errors as [{field, detail}]; the branches of a union speak as one."""
    messages_by_field: dict[str, list[str]] = {}
    for error in errors:
        messages = messages_by_field.setdefault(_field_path(error["loc"]), [])
        if (message := _humanize_error(error)) not in messages:
            messages.append(message)
    return [
        {"field": field, "detail": _join_alternatives(messages)}
        for field, messages in messages_by_field.items()
    ]


def _field_path(loc: Sequence[Any]) -> str:
    """`edits.0.version` for ("body", "many", "edits", 0, "version", "int")."""
    location, *path = (str(part) for part in loc)
    if location == "body" and path[:1] in (["one"], ["many"]):
        path = path[1:]
    while path and (path[-1] in ("int", "float", "str") or path[-1].startswith(("literal[", "constrained-"))):
        path = path[:-1]
    return ".".join(path) or location


def _humanize_error(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _MESSAGES_BY_TYPE:
        return _MESSAGES_BY_TYPE[kind]
    if kind == "string_too_short" and context.get("min_length") == 1:
        return "is empty: write some text."
    if kind == "literal_error":
        return f"must be {context.get('expected')}."
    if kind == "value_error":
        # A check of service.kit.text names its own "field"; here the place is known better.
        text = str(context.get("error", error["msg"]))
        return text.removeprefix("`text` ")
    text = str(error["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return text.replace("should ", "must ", 1).replace("String should", "must").rstrip(".") + "."


def _join_alternatives(messages: Sequence[str]) -> str:
    first, *rest = messages
    return " or ".join([first.rstrip("."), *(w.removeprefix("must be ").rstrip(".") for w in rest)]) + "."


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of this application as a problem."""
    app.add_exception_handler(PalimpsestError, _handle_domain_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _handle_framework_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _handle_validation_error)  # type: ignore[arg-type]
    for error_type in (
        OperationalError,
        InterfaceError,
        PoolTimeout,
        RedisConnectionError,
        RedisTimeoutError,
    ):
        app.add_exception_handler(error_type, _handle_dependency_error)
    app.add_exception_handler(Exception, _handle_unexpected)
