"""What a worker does: its roles as a setting names them, and the kinds of work that they take."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import Misconfigured
from service.jobs.job_kinds import ROLES


def parse_roles(text: str) -> tuple[str, ...]:
    """The roles named in a setting, each once, in the order of the table."""
    names = {word.strip() for word in text.split(",")} - {""}
    if not names or not names <= set(ROLES):
        raise Misconfigured(f"roles cannot be {text!r}: name some of {','.join(ROLES)}.")
    return tuple(role for role in ROLES if role in names)


def kinds_of_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """The kinds of work that these roles take."""
    return tuple(kind for role in roles for kind in ROLES[role])
