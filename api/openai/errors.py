"""Errors in the form of OpenAI's API, for all paths below /v1."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field

from service.errors import PalimpsestError

OPENAI_PREFIX = "/v1/"
AVAILABLE_PATHS = "Available are POST /v1/completions, POST /v1/chat/completions and GET /v1/models."

#: `type` by status; other statuses below 500 are `invalid_request_error`, others from 500 on `server_error`
TYPE_BY_STATUS = {403: "permission_error", 429: "rate_limit_error"}

#: `code` of OpenAI's API by the code of this service; every other code is sent unchanged
OPENAI_CODES = {
    "unauthorized": "invalid_api_key",
    "forbidden": "insufficient_permissions",
    "queue_full": "rate_limit_exceeded",
}

#: description of each status in the OpenAPI document
OPENAI_STATUS_DESCRIPTIONS: dict[int, str] = {
    400: "The request is not valid. `param` names the field and `message` says what to change.",
    401: "The service requires an API key, and the request has no valid one.",
    403: "The API key does not have the required scope. In development mode: the request is not from this machine.",
    404: "The model or version does not exist. `message` lists the valid names.",
    413: "The body is larger than the limit.",
    415: "The `Content-Type` is not `application/json`.",
    429: "The queue is full, or the API key has exceeded its rate limit. Retry after `Retry-After` seconds.",
    500: "The service failed.",
    503: "A dependency of the service is down or not ready. `message` says which.",
}


class OpenAiErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="what happened and what to change")
    type: str
    param: str | None = Field(description="the field at fault")
    code: str | None = Field(description="stable identifier of the error; docs/errors.md lists all codes")


class OpenAiError(BaseModel):
    """An error in the form of OpenAI's API."""

    error: OpenAiErrorDetail


def is_openai_path(path: str) -> bool:
    """Return whether errors of this path have OpenAI's form."""
    return path.startswith(OPENAI_PREFIX)


def error_body(status: int, error: PalimpsestError) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of an error. Status 422 becomes 400, which OpenAI's clients expect."""
    status = HTTPStatus.BAD_REQUEST if status == HTTPStatus.UNPROCESSABLE_ENTITY else status
    default_type = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    message = f"{error.detail} {AVAILABLE_PATHS}" if error.code == "path_not_found" else error.detail
    body = {
        "message": message,
        "type": TYPE_BY_STATUS.get(status, default_type),
        "param": error.field or None,
        "code": OPENAI_CODES.get(error.code, error.code),
    }
    return int(status), {"error": body}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of these statuses."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        documented[status] = {"model": OpenAiError, "description": OPENAI_STATUS_DESCRIPTIONS[status]}
        if status == 429:
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            documented[status]["headers"] = {"Retry-After": seconds}
    return documented | {
        "4XX": {"model": OpenAiError, "description": "Any other client error has the same form."}
    }
