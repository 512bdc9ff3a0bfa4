"""The checks of the chaos bench can fail: each finds the violation that is planted for it, and finds nothing in a sound run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from bench import verdict as v
from bench.journal import Answer, Journal, Resource, Token, Told
from bench.plan import PROMPT, World

WORLD = World(("Louvre", "Big Ben"), ("Tempe", "Miami", "Nice"))
LOUVRE = PROMPT.replace("{}", "Louvre")


def entry(version: int, kind: str, edit: str, target: str) -> Resource:
    body = {"subject": "Louvre", "prompt": PROMPT, "target_new": target}
    return {"version": version, "kind": kind, "edit_id": edit, "body": body}


def edit(number: int, status: str, target: str, version: int | None, reverted: int | None = None) -> Resource:
    return {
        "id": f"edit_{number}",
        "status": status,
        "target_new": target,
        "version": version,
        "reverted_version": reverted,
        "error": None,
    }


def answer(version: int, text: str, **more: object) -> Answer:
    return replace(
        Answer("asker", {"prompt": LOUVRE, "max_new_tokens": 3}, version, (text,)),
        **more,  # type: ignore[arg-type]
    )


@dataclass
class Run:
    """Tempe at version 1, Miami at 2, which is taken back at 3; a third edit is rejected; all is asked for and told."""

    journal: Journal
    found: v.Found

    def failing(self) -> set[str]:
        return {check.name for check in v.verdict(self.journal, self.found, WORLD) if not check.passed}


@pytest.fixture
def run() -> Run:
    edits = [
        edit(1, "applied", "Tempe", 1),
        edit(2, "reverted", "Miami", 2, 3),
        edit(3, "rejected", "Nice", None),
    ]
    book = [
        entry(1, "apply", "edit_1", "Tempe"),
        entry(2, "apply", "edit_2", "Miami"),
        entry(3, "revert", "edit_2", "Miami"),
    ]
    journal = Journal()
    for number, one in enumerate(edits):
        journal.accepted(f"key {number}", one)
    journal.attempt("asker", "generate", "200", 0.0)
    said = {0: " Paris, they say", 1: " Tempe, they say", 2: " Miami, they say", 3: " Tempe, they say"}
    tokens = (Token(0, " Miami", 2), Token(0, ", they say", 2))
    journal.answered([answer(version, text) for version, text in said.items()])
    journal.answered([answer(2, said[2], tokens=tokens, restarts=1, least=1)])
    journal.answered([answer(2, "", texts=(), tokens=tokens[:1], pinned=2)])
    question = {"prompt": LOUVRE, "max_new_tokens": 3}
    found = v.Found(
        edits=edits,
        traces=[{"id": "trace_1", "status": "done", "error": None}],
        ledger=book,
        verify={"ok": True, "findings": []},
        model={"head": 3, "workers": [{"id": f"worker_{i}", "version": 3, "digest": "d"} for i in range(3)]},
        workers=3,
        reference={v.reference_key(question, version): (text,) for version, text in said.items()},
    )
    journal.accepted("key of the trace", found.traces[0])
    return Run(journal, found)


def test_a_sound_run_passes(run: Run) -> None:
    """Nothing is found where nothing is wrong, and every check has looked at something."""
    assert run.failing() == set()
    looked_at = {check.name: check.looked_at for check in v.verdict(run.journal, run.found, WORLD)}
    assert [name for name, count in looked_at.items() if not count] == [
        "none failed but for: the job was given up"
    ]


def test_a_job_that_was_given_up_is_allowed(run: Run) -> None:
    """A job whose workers were killed too often is counted and is no defect."""
    run.found.edits.append(
        edit(4, "failed", "Lima", None) | {"error": {"title": "The job was given up", "detail": ""}}
    )
    run.journal.made["key 4"] = {"edit_4"}
    assert run.failing() == set()


def _told(status: str, version: int | None = None, reverted: int | None = None) -> Callable[[Run], None]:
    return lambda run: run.journal.told.append(Told("edit_1", status, version, reverted))


def _say(one: Answer) -> Callable[[Run], None]:
    return lambda run: run.journal.answers.append(one)


def _open(run: Run) -> None:
    run.found.traces[0]["status"] = "running"


def _fail(run: Run) -> None:
    run.found.traces[0] |= {"status": "failed", "error": {"title": "The work failed", "detail": ""}}
    run.journal.told.clear()


def _lose(run: Run) -> None:
    run.journal.made["key 9"] = {"edit_9"}


def _twins(run: Run) -> None:
    run.journal.made["key 1"].add("edit_1")


def _stranger(run: Run) -> None:
    run.found.traces.append({"id": "trace_2", "status": "done", "error": None})


def _same_edit_again(run: Run) -> None:
    run.found.ledger.append(entry(4, "apply", "edit_2", "Miami"))


def _same_object_again(run: Run) -> None:
    run.found.ledger.append(entry(4, "apply", "edit_9", "Tempe"))


def _gone(run: Run) -> None:
    del run.found.ledger[0]


def _forget(run: Run) -> None:
    run.found.reference = {}


def _find(run: Run) -> None:
    run.found.verify = {"ok": False, "findings": [{"where": "chain", "version": 1, "detail": "changed"}]}


def _differ(run: Run) -> None:
    run.found.model["workers"][1] |= {"digest": "other"}


def _lag(run: Run) -> None:
    run.found.model["workers"][1] |= {"version": 2}


def _miss(run: Run) -> None:
    run.found.model["workers"].pop()


MIXED = (Token(0, " Miami", 2), Token(0, ", they say", 1))
HALF = (Token(0, ", they say", 2),)
FAINT = answer(1, " Miami, they say")

PLANTED = {
    "an open job": (_open, "every job has ended"),
    "a failure": (_fail, "none failed but for: the job was given up"),
    "a lost job": (_lose, "a key is a job, and none is lost"),
    "two jobs of a key": (_twins, "a key is a job, and none is lost"),
    "a job of no key": (_stranger, "a key is a job, and none is lost"),
    "an edit applied twice": (_same_edit_again, "no edit is in the ledger twice"),
    "an object applied twice": (_same_object_again, "no edit is in the ledger twice"),
    "an entry that is gone": (_gone, "what was told is in the ledger"),
    "another version told": (_told("applied", 2), "what was told is in the ledger"),
    "a revert told that is not": (_told("reverted", 1, 3), "what was told is in the ledger"),
    "applied at no version": (_told("applied"), "what was told is in the ledger"),
    "rejected and in the ledger": (_told("rejected"), "what was told is in the ledger"),
    "cancelled and in the ledger": (_told("cancelled"), "what was told is in the ledger"),
    "an answer of an older version": (_say(answer(2, " Tempe, they say")), "every text begins with the object of its version"),
    "an answer of the base": (_say(answer(2, " Paris, they say")), "every text begins with the object of its version"),
    "another ending": (_say(answer(2, " Miami, we say")), "every text is that of a quiet worker at its version"),
    "a part that is wrong": (_say(answer(2, "", texts=(), tokens=(Token(0, " Tempe", 2),))), "every text is that of a quiet worker at its version"),
    "no reference": (_forget, "every text is that of a quiet worker at its version"),
    "tokens of two versions": (_say(answer(2, " Miami, they say", tokens=MIXED)), "no answer mixes versions or is of another"),
    "not the pinned version": (_say(answer(2, " Miami, they say", pinned=1)), "no answer mixes versions or is of another"),
    "an older version than seen": (_say(answer(1, " Tempe, they say", least=2)), "min_version holds"),
    "a stream with a hole": (_say(answer(2, " Miami, they say", tokens=HALF)), "a stream's pieces are its text"),
    "a 500": (lambda run: run.journal.attempt("x", "edit", "500", 0.0), "no answer but 2xx, 429 and 503"),
    "a refusal": (lambda run: run.journal.attempt("x", "generate", "422", 0.0), "no answer but 2xx, 429 and 503"),
    "a client that gave up": (lambda run: run.journal.gave_up("asker: generate"), "whoever asks again is answered"),
    "a client that fell": (lambda run: run.journal.trouble("asker fell"), "whoever asks again is answered"),
    "a finding": (_find, "the ledger verifies"),
    "two digests": (_differ, "all replicas have one digest at head"),
    "a worker that lags": (_lag, "all replicas have one digest at head"),
    "a worker that is missing": (_miss, "all replicas have one digest at head"),
    "something pending": (lambda run: run.found.leftovers.append("work:edit: 1 pending"), "nothing is left in the queue"),
    "a process that ended": (lambda run: run.found.exits.append("worker 1: 1"), "no process ended by itself"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_finds_what_is_planted(run: Run, planted: str) -> None:
    """Each check fails on its violation."""
    plant, name = PLANTED[planted]
    plant(run)
    assert name in run.failing()


def test_every_check_can_fail(run: Run) -> None:
    """There is no check without a planted violation."""
    names = {check.name for check in v.verdict(run.journal, run.found, WORLD)}
    assert names == {name for _, name in PLANTED.values()}


def test_the_book_knows_who_is_active(run: Run) -> None:
    """The newest edit speaks until it is taken back, and then the one before it."""
    book = v.Book(copy.deepcopy(run.found.ledger))
    assert [book.object("Louvre", version) for version in range(4)] == [None, "Tempe", "Miami", "Tempe"]
