"""Who submits work, and its limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class CallerLimits:
    """The limits of a caller. None is the default of the settings."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_queued: int | None = None
    max_concurrent: int | None = None
    weight: int = 1  #: of its work where several callers wait: twice the weight is twice the service

    def with_defaults(self, defaults: CallerLimits) -> CallerLimits:
        """Return these limits, and those of `defaults` where there is none."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(defaults, **given)


DEFAULT_LIMITS = CallerLimits()


@dataclass(frozen=True)
class Caller:
    """An authenticated caller. `actor` is recorded in the ledger and contains no secret."""

    actor: str
    limits: CallerLimits = DEFAULT_LIMITS
