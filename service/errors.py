"""Every error that the house raises on purpose. No HTTP numbers here: `api/errors.py` has the one table.

Each carries a `detail` that tells a person what to change; nothing else reaches a user.
"""

from __future__ import annotations

from typing import Any


class PalimpsestError(Exception):
    """The root of all errors of the house."""

    title = "Something is wrong"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class InvalidInput(PalimpsestError):
    """The request cannot be carried out as it stands. `field` says which part of it."""

    title = "The request is not valid"

    def __init__(self, detail: str, field: str = "", **extra: Any) -> None:
        super().__init__(detail, **extra)
        self.field = field


class NotFound(PalimpsestError):
    """No resource has this id."""

    title = "There is no such resource"


class Conflict(PalimpsestError):
    """The state of the resource forbids this."""

    title = "The state forbids this"


class QueueFull(PalimpsestError):
    """Too much is waiting; `retry_after` is in seconds."""

    title = "The queue is full"

    def __init__(self, detail: str, retry_after: int = 5, **extra: Any) -> None:
        super().__init__(detail, **extra)
        self.retry_after = retry_after


class Unavailable(PalimpsestError):
    """Something that the service depends on is down or not ready yet."""

    title = "The service is not ready"


class Misconfigured(PalimpsestError):
    """The service cannot start as it is configured."""

    title = "The configuration cannot work"


class Cancelled(PalimpsestError):
    """The job was cancelled while it ran."""

    title = "The job was cancelled"


class LeaseLost(PalimpsestError):
    """Another worker has taken the job over; what this one found is thrown away."""

    title = "The job was taken over"


class DigestMismatch(PalimpsestError):
    """This worker's weights are not those of the others at the same version: it must serve nothing."""

    title = "The worker disagrees with the others"
