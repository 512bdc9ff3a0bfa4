"""Everything that the client raises. Each error says what happened and what to change, in the service's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.resources import Edit, Job


@dataclass(frozen=True)
class FieldError:
    """One thing to change in a request."""

    field: str
    detail: str


class PalimpsestError(Exception):
    """The root of all errors. `status` is None where the service gave no answer."""

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        title: str = "",
        errors: Sequence[FieldError] = (),
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.title = title
        self.errors = tuple(errors)
        self.retry_after = retry_after
        self.request_id = request_id  #: the log lines of the service about this request bear it

    @property
    def field(self) -> str | None:
        """The first part of the request that must change, such as `edits.0.prompt`; None when no part is named."""
        return self.errors[0].field if self.errors else None


class InvalidRequest(PalimpsestError):
    """The request cannot be carried out as it stands; nothing was done. `errors` has each thing to change."""


class Unauthorized(PalimpsestError):
    """The service asks for a key, and was given none that is good."""


class Forbidden(PalimpsestError):
    """The key has not the scope that this needs."""


class NotFound(PalimpsestError):
    """No resource has this id."""


class Conflict(PalimpsestError):
    """The state of the resource forbids this."""


class TooManyRequests(PalimpsestError):
    """Too much is waiting, or too much was asked in a minute. `retry_after` has the seconds to wait."""


class ServerError(PalimpsestError):
    """A fault of the service, not of the request."""


class Unavailable(PalimpsestError):
    """The service, or something that it depends on, is down or still starting."""


class Unreachable(Unavailable):
    """Nobody answers at this address, or the connection was lost again and again."""


class JobError(PalimpsestError):
    """A job ended without what it was asked for; `job` is how it ended."""

    def __init__(self, detail: str, job: Job) -> None:
        super().__init__(detail)
        self.job = job


class JobFailed(JobError):
    """The job failed, or was cancelled."""


class EditRejected(JobError):
    """The guard let the edit not land: the model is as it was. `edit.result` has the figures."""

    job: Edit

    @property
    def edit(self) -> Edit:
        return self.job


#: the one table; another status below 500 is `Invalid`, and from 500 on `ServiceFailed`
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
    """The error of a problem document (RFC 9457); of an empty one where the answer was none."""
    kind = ERROR_BY_STATUS.get(status, ServerError if status >= 500 else InvalidRequest)
    entries = [one for one in problem.get("errors") or () if isinstance(one, Mapping)]
    return kind(
        str(problem.get("detail") or problem.get("title") or f"the service answered {status}."),
        status=status,
        title=str(problem.get("title") or ""),
        errors=[FieldError(str(one.get("field", "")), str(one.get("detail", ""))) for one in entries],
        retry_after=retry_after,
        request_id=request_id,
    )
