"""How the part below /v1 says that something is wrong: in the form that clients of OpenAI's API read."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field

OPENAI_PREFIX = "/v1/"
AVAILABLE_PATHS = "Here are POST /v1/completions and GET /v1/models: the resident model continues texts, and there is no chat."

#: status -> type and code, in OpenAI's words where it has some
ERROR_TYPES: dict[int, tuple[str, str | None]] = {
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "insufficient_permissions"),
    409: ("invalid_request_error", "conflict"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "service_unavailable"),
}

#: what each status means here, for the OpenAPI document
OPENAI_STATUS_DESCRIPTIONS: dict[int, str] = {
    400: "Something in the request cannot be carried out; `param` names it and `message` says what to change.",
    401: "The service asks for a key, and the request carries none that is good.",
    403: "The key has not the scope that this needs; or, where no key is needed, `Host` is no name of this machine.",
    404: "There is no such model or version; `message` says which there are.",
    413: "The body is larger than the service reads.",
    415: "The body is not declared as `application/json`.",
    429: "Too much is waiting, or the key has sent too many requests; try again after `Retry-After` seconds.",
    500: "A fault of the service.",
    503: "Something that the service depends on is down or not ready; `message` says what.",
}


class OpenAiErrorDetail(BaseModel):
    """What is wrong."""

    message: str = Field(description="what happened and what to change")
    type: str
    param: str | None = Field(description="the field that it is about")
    code: str | None


class OpenAiError(BaseModel):
    """An error, as clients of OpenAI's API read it."""

    error: OpenAiErrorDetail


def is_openai_path(path: str) -> bool:
    """Whether a path is one of this part."""
    return path.startswith(OPENAI_PREFIX)


def error_body(status: int, message: str, extra: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. What is 422 elsewhere is 400 here: clients expect it."""
    status = HTTPStatus.BAD_REQUEST if status == HTTPStatus.UNPROCESSABLE_ENTITY else status
    default_type = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error_type, code = ERROR_TYPES.get(status, (default_type, None))
    param = next((error["field"] for error in extra.get("errors", ())), extra.get("field")) or None
    if status == HTTPStatus.NOT_FOUND:
        code = "model_not_found" if param == "model" else "not_found"
        message += "" if param else f" {AVAILABLE_PATHS}"
    return int(status), {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these statuses for a route."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        documented[status] = {"model": OpenAiError, "description": OPENAI_STATUS_DESCRIPTIONS[status]}
        if status == 429:
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            documented[status]["headers"] = {"Retry-After": seconds}
    return documented | {
        "4XX": {"model": OpenAiError, "description": "Whatever else is refused has this form, too."}
    }
