"""Requests that the abuse benchmark sends: bench/abuse.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bench import abuse
from bench.abuse import MAX_FREEZE, MAX_MEMORY, Outcome
from bench.abuse_cases import ACCEPTED, PARALLEL, Case, all_cases
from tests.support.application import TestApp


def test_every_route_with_a_body_has_cases(tmp_path: Path) -> None:
    """Each route that reads a body has a largest request and hostile ones; one that retries a job has no body."""
    test_app = TestApp(tmp_path)
    paths = test_app.app.openapi()["paths"]
    test_app.close()
    reading = {path for path, operations in paths.items() if "requestBody" in operations.get("post", {})}
    cases = all_cases()
    assert {c.path for c in cases if c.method == "POST" and c.statuses[:1] == ACCEPTED[:1]} == reading - {
        "/exports"
    }
    assert {c.path for c in cases if c.method == "POST" and c.statuses[:1] != ACCEPTED[:1]} == reading
    assert any(c.parallel == PARALLEL for c in cases)


@pytest.mark.parametrize(
    ("memory", "freezes", "statuses", "failures"),
    [
        (MAX_MEMORY, (MAX_FREEZE, 5.0), (200,), []),
        (MAX_MEMORY + 1, (0.0,), (200,), ["memory"]),
        (0, (5.0, 2 * MAX_FREEZE), (200,), ["freeze"]),
        (0, (0.0,), (200, 500), ["status (200, 500)"]),
    ],
    ids=["within", "memory", "freeze", "status"],
)
def test_bounds_are_checked(
    memory: float, freezes: tuple[float, ...], statuses: tuple[int, ...], failures: list[str]
) -> None:
    """Memory above its bound, a freeze in all repetitions and an unexpected status are failures."""
    case = Case("x", "GET", "/edits")
    assert Outcome(case, 0, statuses, 1.0, 1, int(memory), freezes).failures == failures


def test_exit_status_is_1_when_a_bound_is_exceeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exit status is that of the worst case."""
    reading = abuse.Reading(0.0, 1, 1)
    monkeypatch.setattr(abuse, "all_cases", lambda: [Case("x", "GET", "/edits")])
    monkeypatch.setattr(abuse, "filled_store", tempfile.TemporaryDirectory)
    for freeze, status in ((0.0, 0), (1.0, 1)):
        outcome = Outcome(Case("x", "GET", "/edits"), 0, (200,), 1.0, 1, 0, (freeze,))
        monkeypatch.setattr(abuse, "measure_group", lambda *_, outcome=outcome: ([outcome], reading))
        assert abuse.main([]) == status
