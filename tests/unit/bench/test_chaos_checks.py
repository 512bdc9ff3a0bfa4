"""Each check of the chaos bench finds a planted violation, and no check fails on a correct run."""

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
    """A run without violations: Tempe applied at version 1, Miami at 2 and reverted at 3, a third edit
    rejected."""

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


def test_a_correct_run_passes(planted_run: PlantedRun) -> None:
    """A correct run has no violation, and every check has checked at least one item."""
    assert planted_run.failing() == set()
    checked_counts = {
        check.name: check.checked_count for check in v.run_checks(planted_run.log, planted_run.state, WORLD)
    }
    assert [name for name, count in checked_counts.items() if not count] == [
        "failed jobs have only these codes: attempts_exhausted"
    ]


def test_exhausted_attempts_are_allowed(planted_run: PlantedRun) -> None:
    """A job that failed because its attempts are exhausted is not a violation."""
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
    "an open job": (_open, "all jobs have ended"),
    "a failure": (_fail, "failed jobs have only these codes: attempts_exhausted"),
    "a lost job": (_lose, "each idempotency key has one job"),
    "two jobs of a key": (_twins, "each idempotency key has one job"),
    "a job of no key": (_stranger, "each idempotency key has one job"),
    "an edit applied twice": (_same_edit_again, "no edit is applied twice"),
    "an object applied twice": (_same_object_again, "no edit is applied twice"),
    "an entry that is gone": (_gone, "reports agree with the ledger"),
    "another version told": (_report_status("applied", 2), "reports agree with the ledger"),
    "a revert told that is not": (_report_status("reverted", 1, 3), "reports agree with the ledger"),
    "applied at no version": (_report_status("applied"), "reports agree with the ledger"),
    "rejected and in the ledger": (_report_status("rejected"), "reports agree with the ledger"),
    "cancelled and in the ledger": (_report_status("cancelled"), "reports agree with the ledger"),
    "an answer of an older version": (_add_record(make_record(2, " Tempe, they say")), "texts begin with the object of their version"),
    "an answer of the base": (_add_record(make_record(2, " Paris, they say")), "texts begin with the object of their version"),
    "another ending": (_add_record(make_record(2, " Miami, we say")), "texts are reproducible at their version"),
    "a part that is wrong": (_add_record(make_record(2, "", texts=(), tokens=(TokenEvent(0, " Tempe", 2),))), "texts are reproducible at their version"),
    "no reference": (_forget, "texts are reproducible at their version"),
    "tokens of two versions": (_add_record(make_record(2, " Miami, they say", tokens=MIXED_TOKENS)), "a generation has one version"),
    "not the pinned version": (_add_record(make_record(2, " Miami, they say", pinned_version=1)), "a generation has one version"),
    "an older version than seen": (_add_record(make_record(1, " Tempe, they say", min_version=2)), "min_version is respected"),
    "a stream with a hole": (_add_record(make_record(2, " Miami, they say", tokens=PARTIAL_TOKENS)), "streamed tokens form the text"),
    "a 500": (lambda run: run.log.record_attempt("x", "edit", "500", 0.0), "responses are 2xx, 429 or 503"),
    "a refusal": (lambda run: run.log.record_attempt("x", "generate", "422", 0.0), "responses are 2xx, 429 or 503"),
    "a client that gave up": (lambda run: run.log.record_abandoned("asker: generate"), "retried requests succeed"),
    "a client that fell": (lambda run: run.log.record_anomaly("asker fell"), "retried requests succeed"),
    "a finding": (_find, "the ledger verifies"),
    "two digests": (_differ, "workers have one digest at head"),
    "a worker that lags": (_lag, "workers have one digest at head"),
    "a worker that is missing": (_miss, "workers have one digest at head"),
    "something pending": (lambda run: run.state.queue_leftovers.append("work:edit: 1 pending"), "the queue is empty"),
    "a process that ended": (lambda run: run.state.unexpected_exits.append("worker 1: 1"), "no process exited unexpectedly"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_violation_is_found(planted_run: PlantedRun, planted: str) -> None:
    """Each check fails on its planted violation."""
    plant, name = PLANTED[planted]
    plant(planted_run)
    assert name in planted_run.failing()


def test_every_check_can_fail(planted_run: PlantedRun) -> None:
    """Every check has a planted violation."""
    names = {check.name for check in v.run_checks(planted_run.log, planted_run.state, WORLD)}
    assert names == {name for _, name in PLANTED.values()}


def test_ledger_view_knows_active_object(planted_run: PlantedRun) -> None:
    """The active object is that of the newest edit; after its revert that of the edit before it."""
    ledger_view = v.LedgerView(copy.deepcopy(planted_run.state.ledger))
    assert [ledger_view.active_object("Louvre", version) for version in range(4)] == [
        None,
        "Tempe",
        "Miami",
        "Tempe",
    ]
