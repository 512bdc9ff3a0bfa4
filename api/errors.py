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
from redis.exceptions import ConnectionError as RedisGone
from redis.exceptions import TimeoutError as RedisSilent
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from api.openai import errors as openai
from service.errors import Conflict, InvalidInput, NotFound, PalimpsestError, QueueFull, Unavailable
from service.kit import metrics

log = logging.getLogger("palimpsest.api")

MEDIA_TYPE = "application/problem+json"


class Malformed(PalimpsestError):
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


class TooLarge(PalimpsestError):
    """The body is larger than this service reads."""

    title = "The body is too large"


class WrongMediaType(PalimpsestError):
    """The body is not declared to be JSON."""

    title = "The body must be JSON"


class WorkFailed(PalimpsestError):
    """A worker met an error that is not the user's doing."""

    title = "The work failed"


#: the one table; an error that is not in it is a 500
STATUS: dict[type[PalimpsestError], HTTPStatus] = {
    Malformed: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    NotAcceptable: HTTPStatus.NOT_ACCEPTABLE,
    Conflict: HTTPStatus.CONFLICT,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    WrongMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    WorkFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}

#: the limits that refuse, as the metrics call them
LIMITS: dict[type[PalimpsestError], str] = {TooManyRequests: "rate", QueueFull: "queue", TooLarge: "size"}

#: what each status means here, for the OpenAPI document
MEANING: dict[int, str] = {
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
    detail: str = Field(examples=["must hold exactly one {} where the subject stands; it has none."])


class Problem(BaseModel):
    """An error in the form of RFC 9457. Further members may say more."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", description="always about:blank: `status` and `title` name the kind")
    title: str
    status: int
    detail: str = Field(description="what happened and what to change")
    instance: str | None = Field(None, description="the path that was asked for")
    errors: list[FieldError] | None = Field(None, description="each thing to change; with 422")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these statuses for a route."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    documented: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        documented[status] = {"description": MEANING[status], "content": content}
        if status == 429:
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            documented[status]["headers"] = {"Retry-After": seconds}
    return documented


def encode(content: Any) -> bytes:
    """JSON that is always UTF-8, whatever text is in it."""
    return json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", errors="replace")


def problem(
    request: Request,
    status: int,
    title: str,
    detail: str,
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that tells a person what went wrong."""
    if openai.below(request.url.path):
        status, refused = openai.refused(status, detail, extra or {})
        return Response(encode(refused), status, headers, "application/json")
    body = dict(extra or {}) | {
        "type": "about:blank",
        "title": title,
        "status": int(status),
        "detail": detail,
        "instance": request.url.path,
    }
    return Response(encode(body), int(status), headers, MEDIA_TYPE)


def status_of(error: PalimpsestError) -> HTTPStatus:
    """The status of the nearest class in the table."""
    known = (STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return next(known, HTTPStatus.INTERNAL_SERVER_ERROR)


def from_event(data: Mapping[str, Any]) -> PalimpsestError:
    """The error that a worker published, told by its title; an unknown one is the service's own fault."""
    detail = str(data.get("detail") or "The worker said no more.")
    for kind in STATUS:
        if kind.title == data.get("title"):
            return kind(detail)
    return WorkFailed(detail)


def _ours(request: Request, error: PalimpsestError) -> Response:
    extra = dict(error.extra)
    headers: dict[str, str] = {}
    if limit := LIMITS.get(type(error)):
        metrics.REJECTED.labels(limit).inc()
    if isinstance(error, InvalidInput):
        extra["errors"] = [{"field": error.field, "detail": error.detail}]
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(request, status_of(error), error.title, error.detail, extra, headers)


def _of_framework(request: Request, error: HTTPException) -> Response:
    title = HTTPStatus(error.status_code).phrase
    detail = _FRAMEWORK_DETAIL.get(error.status_code, str(error.detail))
    return problem(request, error.status_code, title, detail, headers=error.headers)


def _of_validation(request: Request, error: RequestValidationError) -> Response:
    errors = in_plain_words(error.errors())
    detail = " ".join(f"`{one['field']}` {one['detail']}" for one in errors[:5])
    more = len(errors) - 5
    if more > 0:
        detail += f" And {more} more."
    return problem(request, 422, InvalidInput.title, detail, {"errors": errors})


def _of_dependency(request: Request, error: Exception) -> Response:
    name = "database" if isinstance(error, SQLAlchemyError) else "queue"
    log.warning("dependency failed", extra={"dependency": name, "error": type(error).__name__})
    detail = f"The {name} does not answer: try again; if it goes on, see that it runs."
    return problem(request, 503, Unavailable.title, detail)


def _of_anything(request: Request, error: Exception) -> Response:
    log.error("request failed", extra={"path": request.url.path, "error": type(error).__name__})
    detail = "A fault of the service, not of the request. Its log has the particulars."
    return problem(request, 500, "The service failed", detail)


#: words of pydantic that would puzzle a user, by the kind of error
_WORDS = {
    "missing": "is missing: add it.",
    "extra_forbidden": "is not known here: remove it or check its spelling.",
    "json_invalid": "is not JSON.",
    "model_type": "must be a JSON object.",
    "model_attributes_type": "must be a JSON object.",
    "dict_type": "must be a JSON object.",
    "string_type": "must be a text.",
    "string_unicode": "holds a character that is no text: remove it.",
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


def in_plain_words(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Pydantic's errors as [{field, detail}]; the branches of a union speak as one."""
    said: dict[str, list[str]] = {}
    for error in errors:
        words = said.setdefault(_field(error["loc"]), [])
        if (one := _words(error)) not in words:
            words.append(one)
    return [{"field": field, "detail": _joined(words)} for field, words in said.items()]


def _field(loc: Sequence[Any]) -> str:
    """`edits.0.version` for ("body", "many", "edits", 0, "version", "int")."""
    where, *path = (str(part) for part in loc)
    if where == "body" and path[:1] in (["one"], ["many"]):
        path = path[1:]
    while path and (path[-1] in ("int", "float", "str") or path[-1].startswith(("literal[", "constrained-"))):
        path = path[:-1]
    return ".".join(path) or where


def _words(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _WORDS:
        return _WORDS[kind]
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


def _joined(words: Sequence[str]) -> str:
    first, *rest = words
    return " or ".join([first.rstrip("."), *(w.removeprefix("must be ").rstrip(".") for w in rest)]) + "."


def install(app: FastAPI) -> None:
    """Answer every error of this application as a problem."""
    app.add_exception_handler(PalimpsestError, _ours)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _of_framework)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _of_validation)  # type: ignore[arg-type]
    for lost in (OperationalError, InterfaceError, PoolTimeout, RedisGone, RedisSilent):
        app.add_exception_handler(lost, _of_dependency)
    app.add_exception_handler(Exception, _of_anything)
