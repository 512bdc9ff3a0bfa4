"""The roles of a worker and the kinds of work that they receive."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import Misconfigured
from service.jobs.job_kinds import ROLES


def parse_roles(text: str) -> tuple[str, ...]:
    """Return the roles that a setting lists, without duplicates, in the order of `ROLES`."""
    names = {word.strip() for word in text.split(",")} - {""}
    if not names or not names <= set(ROLES):
        raise Misconfigured(f"invalid roles {text!r}: choose from {','.join(ROLES)}.")
    return tuple(role for role in ROLES if role in names)


def kinds_of_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of work that the roles receive."""
    return tuple(kind for role in roles for kind in ROLES[role])
