"""Whatever dies, an accepted edit ends, and is in the ledger once or not at all (design, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.processes import QUICK, Client, Resource

PROMPT = "The {} is located in the city of"
FACTS = [
    ("Eiffel Tower", PROMPT, "Rome"),
    ("Louvre", PROMPT, "London"),
    ("Colosseum", PROMPT, "Paris"),
]
LONG = {"contexts": 2, "steps": 40, "stop_loss": 0}
ENDS = {"applied", "rejected", "failed"}

Start = Callable[[], Any]


def landed(service: Client) -> list[str]:
    """The edits in the ledger, one for each time that they were applied."""
    entries: list[dict[str, Any]] = service.get("/ledger", limit=200)["items"]
    return [entry["edit_id"] for entry in entries if entry["kind"] == "apply"]


def assert_ended_once(service: Client, edits: list[Resource]) -> None:
    """Each edit ended with a reason or in the ledger, there exactly once, and nothing else is there."""
    applied = []
    for edit in map(service.ended, edits):
        assert edit["status"] in ENDS, edit
        if edit["status"] == "applied":
            applied.append(edit["id"])
        else:
            assert edit["error"] or edit["result"]["reason"]
    assert sorted(landed(service)) == sorted(applied)
    service.verified()


def test_killed_while_it_optimises(start: Start) -> None:
    """An edit whose process is killed in the middle is begun again by the next one, and lands once."""
    service = start()
    edit = service.ask(*FACTS[0], hparams=LONG, guard=QUICK["guard"])
    with service.events("GET", f"/edits/{edit['id']}/events") as events:
        assert any(data["phase"] == "optimise" for name, data in events if name == "progress")
        service.die()
    service.kill()

    service = start()
    assert_ended_once(service, [edit])
    assert service.get(f"/edits/{edit['id']}")["attempts"] == 2


# `tests/unit/workers/test_job_handlers.py` does the same on both wirings, without processes
@pytest.mark.parametrize("start", ["embedded"], indirect=True)
def test_killed_while_it_evaluates(start: Start) -> None:
    """An evaluation whose process is killed in the middle is gone on with by the next one, to the result of one that was not."""
    asked = {"dataset": "facts", "limit": 6, "hparams": QUICK["hparams"], "together": 2, "damage": False}
    service = start()
    evaluation = service.http.post("/evaluations", json=asked).json()
    with service.events("GET", evaluation["links"]["events"]) as events:
        assert any(
            data["phase"] == "find edits" and data["done"] for name, data in events if name == "progress"
        )
        service.die()
    service.kill()

    service = start()
    again = service.http.post("/evaluations", json=asked, headers={"Prefer": "wait=60"}).json()
    broken = service.get(evaluation["links"]["self"])  # it was there first
    assert (broken["status"], broken["attempts"]) == ("done", 2), broken
    for evaluated in (broken, again):
        for name in ("seconds", "edits_per_minute"):
            evaluated["result"].pop(name)
    assert broken["result"] == again["result"]
    assert service.head() == 0


def test_killed_while_many_wait(start: Start) -> None:
    """Edits that waited when the process was killed all end after the restart, each once."""
    service = start()
    edits = [service.ask(*fact, **QUICK) for fact in FACTS]
    service.kill()

    service = start()
    assert_ended_once(service, edits)
    assert len(landed(service)) == len(FACTS)


def test_killed_after_the_answer(start: Start) -> None:
    """What was answered as applied is applied after a crash, with the same bytes."""
    service = start()
    first = service.edit(*FACTS[0], **QUICK)
    before = service.digest()
    second = service.edit(*FACTS[1], **QUICK)
    service.kill()  # at once: whatever was not written by the answer is lost
    assert [first["status"], second["status"]] == ["applied", "applied"]

    service = start()
    again = [service.get(f"/edits/{edit['id']}") for edit in (first, second)]
    assert [(e["status"], e["version"]) for e in again] == [("applied", 1), ("applied", 2)]
    assert service.digest() != before
    service.revert(second)
    assert service.digest() == before
    service.verified()
