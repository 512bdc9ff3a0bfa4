"""Worker roles and their kinds of work: workers.roles."""

from __future__ import annotations

import pytest

from service.errors import Misconfigured
from service.jobs.job_kinds import WORK_KINDS
from service.settings import Settings
from workers.roles import kinds_of_roles, parse_roles


def test_by_default_a_worker_does_everything() -> None:
    """The default roles cover every kind of work."""
    assert set(kinds_of_roles(parse_roles(Settings().roles))) == set(WORK_KINDS)


def test_roles_are_read_as_people_write_them() -> None:
    """Order, repetition and spaces are ignored."""
    assert parse_roles(" trace,edit, edit") == ("edit", "trace")
    assert kinds_of_roles(("generate",)) == ("generate", "compare")


@pytest.mark.parametrize("text", ["", ",", "edit,sing", "Edit", "generate edit"])
def test_an_unknown_role_is_refused(text: str) -> None:
    """An unknown role, or an empty list, raises Misconfigured with the valid roles."""
    with pytest.raises(Misconfigured, match="generate,edit,trace,evaluate"):
        parse_roles(text)
