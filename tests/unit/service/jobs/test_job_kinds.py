"""The registry of the kinds of work."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from service.jobs.job_kinds import CALL_KINDS, JOB_KINDS, ROLES, WORK_KINDS, CallKind, JobKind
from workers.job_handlers import job_handlers


def test_urgency_orders_all_kinds() -> None:
    """Every kind has a different urgency, and WORK_KINDS is sorted by it."""
    kinds: dict[str, CallKind | JobKind] = {**CALL_KINDS, **JOB_KINDS}
    assert len({kind.urgency for kind in kinds.values()}) == len(kinds)
    assert sorted(kinds, key=lambda name: kinds[name].urgency) == list(WORK_KINDS)


def test_every_kind_has_one_role() -> None:
    """The roles partition the kinds of work."""
    assert sorted(kind for kinds in ROLES.values() for kind in kinds) == sorted(WORK_KINDS)


@pytest.mark.parametrize("kind", JOB_KINDS.values(), ids=list(JOB_KINDS))
def test_names_resolve(kind: JobKind) -> None:
    """The request model and the serializers of a kind can be imported."""
    assert issubclass(kind.request_class(), BaseModel)
    assert kind.serialize(None, []) == [] and kind.serialize_list(None, []) == []


def test_every_job_kind_has_a_handler() -> None:
    """A worker with all roles has a handler for every kind of job."""
    assert set(job_handlers(None, None, None)) == set(JOB_KINDS)  # type: ignore[arg-type]
