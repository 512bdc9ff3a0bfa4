"""The checks of the chaos bench: pure functions from what was told and what there is to what is wrong.

The ledger is what they compare with. Its text form is enough: each edit of a run has an object of its own, so an answer
shows which edits were active when it was made.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.journal import Answer, Journal, Resource
from bench.plan import PROMPT, World

OPEN = ("queued", "running")
#: how a job may fail when nothing is wrong with it: its workers were killed too often
ALLOWED = ("The job was given up",)
#: what a client may meet while things die; everything else is a defect
EXPECTED = {"200", "202", "429", "503", "silence", "connection broken", "the stream ended early"}
EXPECTED |= {"error: The service is not ready"}


@dataclass(frozen=True)
class Check:
    """A promise, how many things were looked at, and those that break it."""

    name: str
    looked_at: int
    violations: list[str]

    @property
    def passed(self) -> bool:
        return not self.violations


@dataclass
class Found:
    """What there is when everything is healed and quiet."""

    edits: list[Resource]
    traces: list[Resource]
    ledger: list[Resource]
    verify: Resource
    model: Resource
    workers: int  #: how many should be there
    leftovers: list[str] = field(default_factory=list)  #: what waits or is owned in the queue
    exits: list[str] = field(default_factory=list)  #: processes that ended and were not killed
    #: (question, version) -> what a quiet worker says
    reference: Mapping[str, Sequence[str]] = field(default_factory=dict)


def reference_key(asked: Resource, version: int) -> str:
    return json.dumps([asked, version], sort_keys=True)


def verdict(journal: Journal, found: Found, world: World) -> list[Check]:
    """Every check, in the order of the design's promises."""
    book = Book(found.ledger)
    return [
        ended(journal, found),
        failures(found),
        accepted(journal, found),
        once(found, book),
        truthful(journal, found, book),
        repeatable(journal, found),
        spoken(journal, book, world),
        unmixed(journal),
        floors(journal),
        whole_streams(journal),
        statuses(journal),
        patience(journal),
        ledger(found),
        one_digest(found),
        quiet_queue(found),
        no_exits(found),
    ]


# the ledger, read without the service's own code


class Book:
    """Who is active at which version, told from the entries alone."""

    def __init__(self, entries: Sequence[Resource]) -> None:
        self.entries = entries
        self.applied = {e["edit_id"]: e["version"] for e in entries if e["kind"] == "apply"}
        self.reverted = {e["edit_id"]: e["version"] for e in entries if e["kind"] == "revert"}
        self._by_subject: dict[str, list[Resource]] = defaultdict(list)
        for entry in entries:
            if entry["kind"] == "apply":
                self._by_subject[entry["body"]["subject"]].append(entry)

    def object(self, subject: str, version: int) -> str | None:
        """What the newest edit of this subject says that is applied and not reverted; None: the base model speaks."""
        said = None
        for entry in self._by_subject[subject]:
            gone = self.reverted.get(entry["edit_id"])
            if entry["version"] <= version and (gone is None or gone > version):
                said = str(entry["body"]["target_new"])
        return said


# jobs


def ended(journal: Journal, found: Found) -> Check:
    """Every job that was accepted, and every other that there is, has ended."""
    jobs = {job["id"]: job["status"] for job in (*found.edits, *found.traces)}
    wrong = [f"{job} is {status}" for job, status in jobs.items() if status in OPEN]
    return Check("every job has ended", len(jobs), wrong)


def failures(found: Found) -> Check:
    """No job failed, but for those whose workers were killed too often."""
    failed = [job for job in (*found.edits, *found.traces) if job["status"] == "failed"]
    wrong = [
        f"{job['id']}: {job['error']}" for job in failed if (job["error"] or {}).get("title") not in ALLOWED
    ]
    return Check(f"none failed but for: {', '.join(ALLOWED).lower()}", len(failed), wrong)


def accepted(journal: Journal, found: Found) -> Check:
    """A key made one job, which is there; a job that no answered key made came of one that was not answered."""
    there = {job["id"] for job in (*found.edits, *found.traces)}
    wrong = [f"{key} made {sorted(ids)}" for key, ids in journal.made.items() if len(ids) != 1]
    known = set().union(*journal.made.values())
    wrong += [f"{job} was accepted and is lost" for job in sorted(known - there)]
    strangers = len(there - known) - sum(" edit" in w or " trace" in w for w in journal.unanswered)
    if strangers > 0:
        wrong.append(f"{strangers} more jobs than keys")
    return Check("a key is a job, and none is lost", len(journal.made), wrong)


def once(found: Found, book: Book) -> Check:
    """No edit is applied twice, and no object by two edits."""
    kinds = Counter((entry["edit_id"], entry["kind"]) for entry in found.ledger)
    wrong = [f"{edit}: {count} entries {kind}" for (edit, kind), count in kinds.items() if count > 1]
    said = Counter(e["body"]["target_new"] for e in found.ledger if e["kind"] == "apply")
    wrong += [f"{target!r} was applied {count} times" for target, count in said.items() if count > 1]
    asked = Counter(edit["target_new"] for edit in found.edits)
    wrong += [f"{target!r} is asked for by {count} edits" for target, count in asked.items() if count > 1]
    return Check("no edit is in the ledger twice", len(book.entries), wrong)


def truthful(journal: Journal, found: Found, book: Book) -> Check:
    """What clients were told, and what the rows say now, is what the ledger says."""
    wrong = []
    for told in journal.told:
        if told.id.startswith("edit"):
            wrong += _against(book, told.id, told.status, told.version, told.reverted)
    for edit in found.edits:
        wrong += _against(book, edit["id"], edit["status"], edit["version"], edit["reverted_version"])
    wrong += _changed(journal, found)
    return Check("what was told is in the ledger", len(journal.told) + len(found.edits), sorted(set(wrong)))


def _against(book: Book, edit: str, status: str, version: int | None, reverted: int | None) -> Iterator[str]:
    if version is not None and book.applied.get(edit) != version:
        yield f"{edit} was told to be applied at {version}, the ledger says {book.applied.get(edit)}"
    if reverted is not None and book.reverted.get(edit) != reverted:
        yield f"{edit} was told to be reverted at {reverted}, the ledger says {book.reverted.get(edit)}"
    if status in ("applied", "superseded", "reverted") and version is None:
        yield f"{edit} was told to be {status} at no version"
    if status == "reverted" and reverted is None:
        yield f"{edit} was told to be reverted at no version"
    if status in ("rejected", "failed", "cancelled") and edit in book.applied:
        yield f"{edit} was told to be {status} and is in the ledger"


def _changed(journal: Journal, found: Found) -> Iterator[str]:
    """An end is an end: only what was applied may be called otherwise later."""
    now = {job["id"]: job["status"] for job in (*found.edits, *found.traces)}
    standing = ("applied", "superseded", "reverted")
    for told in journal.told:
        if told.status in OPEN or told.id not in now:
            continue
        if now[told.id] != told.status and not (now[told.id] in standing and told.status in standing):
            yield f"{told.id} was told to be {told.status} and is {now[told.id]}"


# answers


def repeatable(journal: Journal, found: Found) -> Check:
    """A quiet worker gives the same text for the same question and version, to the last letter."""
    wrong = []
    for answer in journal.answers:
        expected = found.reference.get(reference_key(answer.asked, answer.version))
        if expected is None:
            wrong.append(f"{_name(answer)}: nobody asked again")
        elif answer.complete and list(answer.texts) != list(expected):
            wrong.append(f"{_name(answer)}: said {answer.texts}, a quiet worker says {list(expected)}")
        elif not answer.complete:
            parts = _joined(answer, len(expected))
            if not all(whole.startswith(part) for part, whole in zip(parts, expected, strict=True)):
                wrong.append(f"{_name(answer)}: began {parts}, a quiet worker says {list(expected)}")
    return Check("every text is that of a quiet worker at its version", len(journal.answers), wrong)


def spoken(journal: Journal, book: Book, world: World) -> Check:
    """A greedy answer begins with the object that is active at its version, and no answer with another edit's."""
    wrong, looked_at = [], 0
    subject_of = {PROMPT.replace("{}", subject): subject for subject in world.subjects}
    objects = {e["body"]["target_new"] for e in book.entries if e["kind"] == "apply"}
    for answer in journal.answers:
        if not answer.complete or answer.asked.get("temperature"):
            continue
        for prompt, text in zip(answer.prompts(), answer.texts, strict=True):
            looked_at += 1
            expected = book.object(subject_of[prompt], answer.version)
            begins = next((o for o in objects if text.startswith(f" {o}")), None)
            if begins != expected:
                wrong.append(
                    f"{_name(answer)}: {prompt!r} gave {text!r}, the ledger has {expected or 'the base'}"
                )
    return Check("every text begins with the object of its version", looked_at, wrong)


def unmixed(journal: Journal) -> Check:
    """All of one answer is of one version, and of the one that was asked for."""
    wrong = []
    for answer in journal.answers:
        versions = {answer.version, *(token.version for token in answer.tokens or ())}
        if len(versions) > 1:
            wrong.append(f"{_name(answer)}: tokens of versions {sorted(versions)}")
        if answer.pinned is not None and answer.version != answer.pinned:
            wrong.append(f"{_name(answer)}: version {answer.pinned} was asked for")
    return Check("no answer mixes versions or is of another", len(journal.answers), wrong)


def floors(journal: Journal) -> Check:
    """Whoever has seen a version is answered from it or from a newer one."""
    asked = [answer for answer in journal.answers if answer.least is not None]
    wrong = [f"{_name(a)}: min_version was {a.least}" for a in asked if a.version < (a.least or 0)]
    return Check("min_version holds", len(asked), wrong)


def whole_streams(journal: Journal) -> Check:
    """The pieces of a stream since its last restart are its text."""
    streams = [answer for answer in journal.answers if answer.complete and answer.tokens is not None]
    wrong = [
        f"{_name(answer)}: streamed {_joined(answer, len(answer.texts))}, ended with {list(answer.texts)}"
        for answer in streams
        if _joined(answer, len(answer.texts)) != list(answer.texts)
    ]
    return Check("a stream's pieces are its text", len(streams), wrong)


def _joined(answer: Answer, rows: int) -> list[str]:
    pieces: dict[int, str] = defaultdict(str)
    for token in answer.tokens or ():
        pieces[token.index] += token.text
    return [pieces[row] for row in range(max(rows, *(i + 1 for i in pieces), 0))]


def _name(answer: Answer) -> str:
    return f"{answer.client} at version {answer.version}"


# the doors


def statuses(journal: Journal) -> Check:
    """Nothing but what a client may meet while things die: no 500, no refusal of what is right."""
    odd = Counter((a.action, a.outcome) for a in journal.attempts if a.outcome not in EXPECTED)
    wrong = [f"{action}: {outcome} ({count} times)" for (action, outcome), count in odd.items()]
    return Check("no answer but 2xx, 429 and 503", len(journal.attempts), wrong)


def patience(journal: Journal) -> Check:
    """Whoever asks again is answered in the end, and no client met what it could not understand."""
    return Check("whoever asks again is answered", len(journal.made), journal.unanswered + journal.troubles)


# the house


def ledger(found: Found) -> Check:
    """`/ledger/verify` finds nothing."""
    wrong = [json.dumps(finding) for finding in found.verify["findings"]]
    if not found.verify["ok"] and not wrong:
        wrong = ["not ok, and no finding says why"]
    return Check("the ledger verifies", len(found.ledger), wrong)


def one_digest(found: Found) -> Check:
    """Every worker is there, stands at head, and all have the same bytes."""
    head, there = found.model["head"], found.model["workers"]
    there = [worker for worker in there if worker.get("state", "serving") == "serving"]
    wrong = [f"{w['id']} stands at {w['version']}, head is {head}" for w in there if w["version"] != head]
    if len(there) != found.workers:
        wrong.append(f"{len(there)} workers of {found.workers} are there")
    digests = {worker["digest"] for worker in there}
    if len(digests) != 1 or None in digests:
        wrong.append(f"digests at head: {sorted(map(str, digests))}")
    return Check("all replicas have one digest at head", len(there), wrong)


def quiet_queue(found: Found) -> Check:
    """Nothing waits in the queue and nothing in it is owned."""
    return Check("nothing is left in the queue", 1, list(found.leftovers))


def no_exits(found: Found) -> Check:
    """No process ended that was not killed."""
    return Check("no process ended by itself", 1, list(found.exits))


def passed(checks: Iterable[Check]) -> bool:
    return all(check.passed for check in checks)
