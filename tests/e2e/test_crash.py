"""After a crash every accepted edit ends, and is in the ledger once or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.processes import FAST_EDIT_OPTIONS, Resource, RunningService, ServiceClient

PROMPT = "The {} is located in the city of"
FACTS = [
    ("Eiffel Tower", PROMPT, "Rome"),
    ("Louvre", PROMPT, "London"),
    ("Colosseum", PROMPT, "Paris"),
]
SLOW_HPARAMS = {"contexts": 2, "steps": 40, "stop_loss": 0}
FINAL_STATUSES = {"applied", "rejected", "failed"}

StartService = Callable[[], RunningService]


def applied_edit_ids(service: ServiceClient) -> list[str]:
    """Return the edit ids of the apply entries of the ledger."""
    entries: list[dict[str, Any]] = service.get("/ledger", limit=200)["items"]
    return [entry["edit_id"] for entry in entries if entry["kind"] == "apply"]


def assert_ended_once(service: ServiceClient, edits: list[Resource]) -> None:
    """Assert that each edit failed with a reason or is in the ledger exactly once, and nothing else is."""
    applied = []
    for edit in map(service.wait_for_edit, edits):
        assert edit["status"] in FINAL_STATUSES, edit
        if edit["status"] == "applied":
            applied.append(edit["id"])
        else:
            assert edit["error"] or edit["result"]["reason"]
    assert sorted(applied_edit_ids(service)) == sorted(applied)
    service.verify_ledger()


def test_killed_while_it_optimises(start_service: StartService) -> None:
    """An edit whose process is killed is run again by the next process and committed once."""
    service = start_service()
    edit = service.submit_edit(*FACTS[0], hparams=SLOW_HPARAMS, guard=FAST_EDIT_OPTIONS["guard"])
    with service.stream_events("GET", f"/edits/{edit['id']}/events") as events:
        assert any(data["phase"] == "optimize" for name, data in events if name == "progress")
        service.sigkill()
    service.kill()

    service = start_service()
    assert_ended_once(service, [edit])
    assert service.get(f"/edits/{edit['id']}")["attempts"] == 2


# tests/integration/workers/test_job_handlers.py does the same on both wirings without processes
@pytest.mark.parametrize("start_service", ["embedded"], indirect=True)
def test_killed_while_it_evaluates(start_service: StartService) -> None:
    """An evaluation whose process is killed is resumed by the next process, with the result of an uninterrupted one."""
    request = {
        "dataset": "facts",
        "limit": 6,
        "hparams": FAST_EDIT_OPTIONS["hparams"],
        "batch_size": 2,
        "damage": False,
    }
    service = start_service()
    evaluation = service.http.post("/evaluations", json=request).json()
    with service.stream_events("GET", evaluation["links"]["events"]) as events:
        assert any(data["phase"] == "find" and data["done"] for name, data in events if name == "progress")
        service.sigkill()
    service.kill()

    service = start_service()
    uninterrupted = service.http.post("/evaluations", json=request, headers={"Prefer": "wait=60"}).json()
    resumed = service.get(evaluation["links"]["self"])  # it was submitted first
    assert (resumed["status"], resumed["attempts"]) == ("done", 2), resumed
    for evaluated in (resumed, uninterrupted):
        for name in ("seconds", "edits_per_minute"):
            evaluated["result"].pop(name)
    assert resumed["result"] == uninterrupted["result"]
    assert service.head() == 0


def test_killed_while_many_wait(start_service: StartService) -> None:
    """Edits that were queued when the process was killed are each run once after the restart."""
    service = start_service()
    edits = [service.submit_edit(*fact, **FAST_EDIT_OPTIONS) for fact in FACTS]
    service.kill()

    service = start_service()
    assert_ended_once(service, edits)
    assert len(applied_edit_ids(service)) == len(FACTS)


def test_killed_after_the_answer(start_service: StartService) -> None:
    """An edit reported as applied is applied after a crash, with the same digest."""
    service = start_service()
    first = service.edit(*FACTS[0], **FAST_EDIT_OPTIONS)
    before = service.head_digest()
    second = service.edit(*FACTS[1], **FAST_EDIT_OPTIONS)
    service.kill()  # immediately: data not written before the response is lost
    assert [first["status"], second["status"]] == ["applied", "applied"]

    service = start_service()
    again = [service.get(f"/edits/{edit['id']}") for edit in (first, second)]
    assert [(e["status"], e["version"]) for e in again] == [("applied", 1), ("applied", 2)]
    assert service.head_digest() != before
    service.revert(second)
    assert service.head_digest() == before
    service.verify_ledger()
