"""Responses as dataclasses: palimpsest.resources."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import UTC, datetime

import pytest

from palimpsest import Edit, Model, Progress

ANSWER = {
    "id": "edit_1",
    "status": "applied",
    "subject": "s",
    "prompt": "{} is",
    "created": "2026-01-02T03:04:05+00:00",
    "progress": {"phase": "find", "done": 1, "total": 2},
    "related": ["edit_0"],
    "version": None,
    "of_the_future": 7,
}


def test_unknown_members_stay_in_raw() -> None:
    """Unknown members are in `raw`; null means the default; times, lists and nested records are converted."""
    edit = Edit.from_json(ANSWER)
    assert edit.raw["of_the_future"] == 7 and edit.version is None and not edit.applied
    assert edit.created == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert edit.progress == Progress(phase="find", done=1, total=2) and edit.related == ("edit_0",)


def test_records_do_not_change() -> None:
    """Resources are immutable."""
    with pytest.raises(FrozenInstanceError):
        Edit.from_json(ANSWER).status = "reverted"  # type: ignore[misc]


def test_records_hold_records() -> None:
    """Nested objects are converted to resources."""
    worker = {"id": "w", "state": "serving", "version": 2, "roles": ["edit"]}
    model = Model.from_json({"name": "m", "fingerprint": "f", "head": 2, "workers": [worker]})
    assert [(w.id, w.roles) for w in model.workers] == [("w", ("edit",))]
