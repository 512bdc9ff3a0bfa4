"""The checks of the chaos bench can fail: each finds the violation that is planted for it, and finds nothing in a sound run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from bench import chaos_checks as v
from bench.chaos_plan import PROMPT, FactPool
from bench.client_log import ClientLog, GenerationRecord, ReportedStatus, Resource, TokenEvent

WORLD = FactPool(("Louvre", "Big Ben"), ("Tempe", "Miami", "Nice"))
LOUVRE = PROMPT.replace("{}", "Louvre")


def ledger_entry(version: int, kind: str, edit: str, target: str) -> Resource:
    body = {"subject": "Louvre", "prompt": PROMPT, "target_new": target}
    return {"version": version, "kind": kind, "edit_id": edit, "body": body}


def edit_resource(
    number: int, status: str, target: str, version: int | None, reverted: int | None = None
) -> Resource:
    return {
        "id": f"edit_{number}",
        "status": status,
        "target_new": target,
        "version": version,
        "reverted_version": reverted,
        "error": None,
    }


def make_record(version: int, text: str, **more: object) -> GenerationRecord:
    return replace(
        GenerationRecord("asker", {"prompt": LOUVRE, "max_new_tokens": 3}, version, (text,)),
        **more,  # type: ignore[arg-type]
    )


@dataclass
class PlantedRun:
    """Tempe at version 1, Miami at 2, which is taken back at 3; a third edit is rejected; all is asked for and told."""

    log: ClientLog
    state: v.FinalState

    def failing(self) -> set[str]:
        return {check.name for check in v.run_checks(self.log, self.state, WORLD) if not check.passed}


@pytest.fixture
def planted_run() -> PlantedRun:
    edits = [
        edit_resource(1, "applied", "Tempe", 1),
        edit_resource(2, "reverted", "Miami", 2, 3),
        edit_resource(3, "rejected", "Nice", None),
    ]
    entries = [
        ledger_entry(1, "apply", "edit_1", "Tempe"),
        ledger_entry(2, "apply", "edit_2", "Miami"),
        ledger_entry(3, "revert", "edit_2", "Miami"),
    ]
    log = ClientLog()
    for number, edit_row in enumerate(edits):
        log.record_accepted(f"key {number}", edit_row)
    log.record_attempt("asker", "generate", "200", 0.0)
    texts = {0: " Paris, they say", 1: " Tempe, they say", 2: " Miami, they say", 3: " Tempe, they say"}
    tokens = (TokenEvent(0, " Miami", 2), TokenEvent(0, ", they say", 2))
    log.record_generations([make_record(version, text) for version, text in texts.items()])
    log.record_generations([make_record(2, texts[2], tokens=tokens, resets=1, min_version=1)])
    log.record_generations([make_record(2, "", texts=(), tokens=tokens[:1], pinned_version=2)])
    question = {"prompt": LOUVRE, "max_new_tokens": 3}
    state = v.FinalState(
        edits=edits,
        traces=[{"id": "trace_1", "status": "done", "error": None}],
        ledger=entries,
        verification={"ok": True, "findings": []},
        model={"head": 3, "workers": [{"id": f"worker_{i}", "version": 3, "digest": "d"} for i in range(3)]},
        expected_workers=3,
        reference_texts={v.reference_key(question, version): (text,) for version, text in texts.items()},
    )
    log.record_accepted("key of the trace", state.traces[0])
    return PlantedRun(log, state)


def test_a_sound_run_passes(planted_run: PlantedRun) -> None:
    """Nothing is found where nothing is wrong, and every check has looked at something."""
    assert planted_run.failing() == set()
    checked_counts = {
        check.name: check.checked_count for check in v.run_checks(planted_run.log, planted_run.state, WORLD)
    }
    assert [name for name, count in checked_counts.items() if not count] == [
        "none failed but for: attempts_exhausted"
    ]


def test_a_job_that_was_given_up_is_allowed(planted_run: PlantedRun) -> None:
    """A job whose workers were killed too often is counted and is no defect."""
    planted_run.state.edits.append(
        edit_resource(4, "failed", "Lima", None)
        | {"error": {"code": "attempts_exhausted", "title": "", "detail": ""}}
    )
    planted_run.log.ids_by_key["key 4"] = {"edit_4"}
    assert planted_run.failing() == set()


def _report_status(
    status: str, version: int | None = None, reverted: int | None = None
) -> Callable[[PlantedRun], None]:
    return lambda run: run.log.reported_statuses.append(ReportedStatus("edit_1", status, version, reverted))


def _add_record(record: GenerationRecord) -> Callable[[PlantedRun], None]:
    return lambda run: run.log.generations.append(record)


def _open(run: PlantedRun) -> None:
    run.state.traces[0]["status"] = "running"


def _fail(run: PlantedRun) -> None:
    run.state.traces[0] |= {
        "status": "failed",
        "error": {"code": "internal_error", "title": "", "detail": ""},
    }
    run.log.reported_statuses.clear()


def _lose(run: PlantedRun) -> None:
    run.log.ids_by_key["key 9"] = {"edit_9"}


def _twins(run: PlantedRun) -> None:
    run.log.ids_by_key["key 1"].add("edit_1")


def _stranger(run: PlantedRun) -> None:
    run.state.traces.append({"id": "trace_2", "status": "done", "error": None})


def _same_edit_again(run: PlantedRun) -> None:
    run.state.ledger.append(ledger_entry(4, "apply", "edit_2", "Miami"))


def _same_object_again(run: PlantedRun) -> None:
    run.state.ledger.append(ledger_entry(4, "apply", "edit_9", "Tempe"))


def _gone(run: PlantedRun) -> None:
    del run.state.ledger[0]


def _forget(run: PlantedRun) -> None:
    run.state.reference_texts = {}


def _find(run: PlantedRun) -> None:
    run.state.verification = {
        "ok": False,
        "findings": [{"where": "chain", "version": 1, "detail": "changed"}],
    }


def _differ(run: PlantedRun) -> None:
    run.state.model["workers"][1] |= {"digest": "other"}


def _lag(run: PlantedRun) -> None:
    run.state.model["workers"][1] |= {"version": 2}


def _miss(run: PlantedRun) -> None:
    run.state.model["workers"].pop()


MIXED_TOKENS = (TokenEvent(0, " Miami", 2), TokenEvent(0, ", they say", 1))
PARTIAL_TOKENS = (TokenEvent(0, ", they say", 2),)

PLANTED = {
    "an open job": (_open, "every job has ended"),
    "a failure": (_fail, "none failed but for: attempts_exhausted"),
    "a lost job": (_lose, "a key is a job, and none is lost"),
    "two jobs of a key": (_twins, "a key is a job, and none is lost"),
    "a job of no key": (_stranger, "a key is a job, and none is lost"),
    "an edit applied twice": (_same_edit_again, "no edit is in the ledger twice"),
    "an object applied twice": (_same_object_again, "no edit is in the ledger twice"),
    "an entry that is gone": (_gone, "what was told is in the ledger"),
    "another version told": (_report_status("applied", 2), "what was told is in the ledger"),
    "a revert told that is not": (_report_status("reverted", 1, 3), "what was told is in the ledger"),
    "applied at no version": (_report_status("applied"), "what was told is in the ledger"),
    "rejected and in the ledger": (_report_status("rejected"), "what was told is in the ledger"),
    "cancelled and in the ledger": (_report_status("cancelled"), "what was told is in the ledger"),
    "an answer of an older version": (_add_record(make_record(2, " Tempe, they say")), "every text begins with the object of its version"),
    "an answer of the base": (_add_record(make_record(2, " Paris, they say")), "every text begins with the object of its version"),
    "another ending": (_add_record(make_record(2, " Miami, we say")), "every text is that of a quiet worker at its version"),
    "a part that is wrong": (_add_record(make_record(2, "", texts=(), tokens=(TokenEvent(0, " Tempe", 2),))), "every text is that of a quiet worker at its version"),
    "no reference": (_forget, "every text is that of a quiet worker at its version"),
    "tokens of two versions": (_add_record(make_record(2, " Miami, they say", tokens=MIXED_TOKENS)), "no answer mixes versions or is of another"),
    "not the pinned version": (_add_record(make_record(2, " Miami, they say", pinned_version=1)), "no answer mixes versions or is of another"),
    "an older version than seen": (_add_record(make_record(1, " Tempe, they say", min_version=2)), "min_version holds"),
    "a stream with a hole": (_add_record(make_record(2, " Miami, they say", tokens=PARTIAL_TOKENS)), "a stream's pieces are its text"),
    "a 500": (lambda run: run.log.record_attempt("x", "edit", "500", 0.0), "no answer but 2xx, 429 and 503"),
    "a refusal": (lambda run: run.log.record_attempt("x", "generate", "422", 0.0), "no answer but 2xx, 429 and 503"),
    "a client that gave up": (lambda run: run.log.record_abandoned("asker: generate"), "whoever asks again is answered"),
    "a client that fell": (lambda run: run.log.record_anomaly("asker fell"), "whoever asks again is answered"),
    "a finding": (_find, "the ledger verifies"),
    "two digests": (_differ, "all replicas have one digest at head"),
    "a worker that lags": (_lag, "all replicas have one digest at head"),
    "a worker that is missing": (_miss, "all replicas have one digest at head"),
    "something pending": (lambda run: run.state.queue_leftovers.append("work:edit: 1 pending"), "nothing is left in the queue"),
    "a process that ended": (lambda run: run.state.unexpected_exits.append("worker 1: 1"), "no process ended by itself"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_finds_what_is_planted(planted_run: PlantedRun, planted: str) -> None:
    """Each check fails on its violation."""
    plant, name = PLANTED[planted]
    plant(planted_run)
    assert name in planted_run.failing()


def test_every_check_can_fail(planted_run: PlantedRun) -> None:
    """There is no check without a planted violation."""
    names = {check.name for check in v.run_checks(planted_run.log, planted_run.state, WORLD)}
    assert names == {name for _, name in PLANTED.values()}


def test_ledger_view_knows_active_object(planted_run: PlantedRun) -> None:
    """The newest edit speaks until it is taken back, and then the one before it."""
    ledger_view = v.LedgerView(copy.deepcopy(planted_run.state.ledger))
    assert [ledger_view.active_object("Louvre", version) for version in range(4)] == [
        None,
        "Tempe",
        "Miami",
        "Tempe",
    ]
