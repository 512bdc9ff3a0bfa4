"""Errors that the client raises. Each carries the `code` and the `detail` of the service's problem document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.resources import Edit, Job


@dataclass(frozen=True)
class FieldError:
    """One invalid field of a request."""

    field: str
    detail: str


class PalimpsestError(Exception):
    """Base class of all errors of the client. `status` is None when the service sent no response."""

    def __init__(
        self,
        detail: str,
        *,
        code: str = "",
        status: int | None = None,
        title: str = "",
        errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code  #: the stable identifier of the error, such as `queue_full`; docs/api.md lists all
        self.status = status
        self.title = title
        self.errors = tuple(errors)
        self.retry_after = retry_after  #: seconds
        self.request_id = request_id  #: the id of the request in the service's log

    @property
    def field(self) -> str | None:
        """The path of the first invalid field, such as `edits.0.prompt`; None when the error names no field."""
        return self.errors[0].field if self.errors else None


class InvalidRequest(PalimpsestError):
    """The request is not valid; nothing was changed. `errors` lists the invalid fields."""


class Unauthorized(PalimpsestError):
    """The service requires an API key, and the request has none or an invalid one."""


class Forbidden(PalimpsestError):
    """The API key lacks the scope that the call requires."""


class NotFound(PalimpsestError):
    """No resource has this id."""


class Conflict(PalimpsestError):
    """The state of the resource does not allow the call."""


class TooManyRequests(PalimpsestError):
    """The queue is full or the rate limit is exceeded. `retry_after` is the time to wait in seconds."""


class ServerError(PalimpsestError):
    """The service failed to handle a valid request."""


class Unavailable(PalimpsestError):
    """The service or one of its dependencies is down or starting."""


class Unreachable(Unavailable):
    """No service answers at the address, or the connection was lost repeatedly."""


class JobError(PalimpsestError):
    """A job ended without its result. `job` is its final state."""

    def __init__(self, detail: str, job: Job, code: str = "") -> None:
        super().__init__(detail, code=code)
        self.job = job


class JobFailed(JobError):
    """The job failed or was cancelled."""


class EditRejected(JobError):
    """The guard rejected the edit; the model is unchanged. `edit.result` has the measurements."""

    job: Edit

    @property
    def edit(self) -> Edit:
        """The rejected edit."""
        return self.job


#: error classes by `code`; the HTTP status decides only for a code that this client does not know
ERROR_BY_CODE: dict[str, type[PalimpsestError]] = {
    "malformed_json": InvalidRequest,
    "invalid_input": InvalidRequest,
    "method_not_allowed": InvalidRequest,
    "not_acceptable": InvalidRequest,
    "payload_too_large": InvalidRequest,
    "unsupported_media_type": InvalidRequest,
    "unauthorized": Unauthorized,
    "forbidden": Forbidden,
    "not_found": NotFound,
    "model_not_found": NotFound,
    "path_not_found": NotFound,
    "conflict": Conflict,
    "queue_full": TooManyRequests,
    "rate_limit_exceeded": TooManyRequests,
    "unavailable": Unavailable,
    "database_unreachable": Unavailable,
    "commit_outcome_unknown": Unavailable,
    "internal_error": ServerError,
}
ERROR_BY_STATUS: dict[int, type[PalimpsestError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: TooManyRequests,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def error_from_problem(
    status: int, problem: Mapping[str, Any], retry_after: float | None = None, request_id: str | None = None
) -> PalimpsestError:
    """Return the error for a problem document (RFC 9457), or for a response without one."""
    code = str(problem.get("code") or "")
    by_status = ERROR_BY_STATUS.get(status, ServerError if status >= 500 else InvalidRequest)
    field_errors = [one for one in problem.get("errors") or () if isinstance(one, Mapping)]
    return ERROR_BY_CODE.get(code, by_status)(
        str(problem.get("detail") or problem.get("title") or f"the service responded with status {status}."),
        code=code,
        status=status,
        title=str(problem.get("title") or ""),
        errors=[FieldError(str(one.get("field", "")), str(one.get("detail", ""))) for one in field_errors],
        retry_after=retry_after,
        request_id=request_id,
    )
