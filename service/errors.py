"""Domain errors. Each class has a stable `code`; `api/errors.py` maps classes to HTTP statuses.

`code` identifies an error on the wire, in job rows and in events. Titles and details are text for people and may
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

ERROR_TYPE_PREFIX = "urn:palimpsest:error:"


class PalimpsestError(Exception):
    """Base class of all errors that Palimpsest raises on purpose. Every subclass has its own `code` and `title`."""

    code: ClassVar[str]  #: stable identifier in snake_case
    title: ClassVar[str]  #: short summary of the kind of error, the same for every occurrence
    detail: str  #: what happened and what to change
    field: str  #: part of the request at fault, as a dotted path; "" if no part is

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not {"code", "title"} <= vars(cls).keys():
            raise TypeError(f"{cls.__name__} must define `code` and `title`")

    def __init__(self, detail: str, field: str = "", **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.extra = extra


class InternalError(PalimpsestError):
    """An unexpected error inside the service or a worker. The log has the details."""

    code = "internal_error"
    title = "Internal error"


class InvalidInput(PalimpsestError):
    """The request is well-formed and cannot be carried out. Nothing was changed."""

    code = "invalid_input"
    title = "Invalid input"


class NoChatTemplate(InvalidInput):
    """The request has messages, and the served model has no chat template."""

    code = "no_chat_template"
    title = "No chat template"


class NotFound(PalimpsestError):
    """No resource has this id."""

    code = "not_found"
    title = "Not found"


class ModelNotFound(NotFound):
    """No model or version has this name."""

    code = "model_not_found"
    title = "Model not found"


class Conflict(PalimpsestError):
    """The current state of the resource does not allow the operation."""

    code = "conflict"
    title = "Conflict with the current state"


class AlreadySays(Conflict):
    """The model already says the new object of an edit, without any edit of the subject."""

    code = "already_says"
    title = "Already said"


class QueueFull(PalimpsestError):
    """Too many jobs or calls are queued. Retry after `Retry-After` seconds."""

    code = "queue_full"
    title = "Queue full"

    def __init__(self, detail: str, field: str = "", retry_after: int = 5, **extra: Any) -> None:
        super().__init__(detail, field, **extra)
        self.retry_after = retry_after


class Unavailable(PalimpsestError):
    """A dependency of the service is down or not ready yet."""

    code = "unavailable"
    title = "Service unavailable"


class DatabaseUnreachable(Unavailable):
    """The connection to the database was refused or lost."""

    code = "database_unreachable"
    title = "Database unreachable"


class CommitOutcomeUnknown(Unavailable):
    """The database connection was lost during a commit. The transaction may or may not have been written."""

    code = "commit_outcome_unknown"
    title = "Commit outcome unknown"


class Misconfigured(PalimpsestError):
    """The process cannot start with its configuration."""

    code = "misconfigured"
    title = "Invalid configuration"


class PreparationFailed(PalimpsestError):
    """A worker could not collect the statistics of keys, or sample the texts, that an edit needs."""

    code = "preparation_failed"
    title = "Preparation failed"


class Cancelled(PalimpsestError):
    """The job was cancelled while it ran."""

    code = "cancelled"
    title = "Job cancelled"


class LeaseLost(PalimpsestError):
    """Another worker has claimed the job. The result of this worker is discarded."""

    code = "lease_lost"
    title = "Job lease lost"


class AttemptsExhausted(PalimpsestError):
    """Every worker that started the job or call died. It is not tried again."""

    code = "attempts_exhausted"
    title = "Attempts exhausted"


class DigestMismatch(PalimpsestError):
    """The weight digest of this worker differs from that of the other workers at the same version."""

    code = "digest_mismatch"
    title = "Weight digest mismatch"


def error_classes(base: type[PalimpsestError] = PalimpsestError) -> Iterator[type[PalimpsestError]]:
    """Yield every error class that is imported, subclasses after their base."""
    for error_class in base.__subclasses__():
        if "code" in vars(error_class):  # a rejected class exists until it is garbage-collected
            yield error_class
        yield from error_classes(error_class)


def error_type(code: str) -> str:
    """Return the `type` URI of a problem document (RFC 9457)."""
    return f"{ERROR_TYPE_PREFIX}{code}"


def error_document(error: BaseException) -> dict[str, str]:
    """Return `code`, `title` and `detail` of an error, and `field` if it names one.

    The message of any other exception is not included: it can contain prompts, paths or credentials.
    """
    if not isinstance(error, PalimpsestError):
        error = InternalError(
            "The worker failed with an unexpected error; its log has the details. Try again."
        )
    document = {"code": error.code, "title": error.title, "detail": error.detail}
    return document | ({"field": error.field} if error.field else {})


def error_from_document(document: Mapping[str, Any]) -> PalimpsestError:
    """Return the error that a document describes, by its code; InternalError if the code is unknown."""
    detail = str(document.get("detail") or "No further details.")
    classes = {error_class.code: error_class for error_class in error_classes()}
    return classes.get(str(document.get("code")), InternalError)(detail, str(document.get("field") or ""))
