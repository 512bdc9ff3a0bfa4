"""The checks of the chaos bench: pure functions from the client log and the final state to violations.

The checks compare both with the ledger entries. Each edit of a run has a different object, so a generated text shows
which edits were active in its version.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.chaos_plan import PROMPT, FactPool
from bench.client_log import ClientLog, GenerationRecord, Resource

PENDING_STATUSES = ("queued", "running")
#: error codes that a failed job may have: its workers were killed too often
ALLOWED_FAILURES = ("attempts_exhausted",)
#: outcomes that a client may observe during faults; every other outcome is a defect
EXPECTED_OUTCOMES = {"200", "202", "429", "503", "silence", "connection broken", "the stream ended early"}
EXPECTED_OUTCOMES |= {"error: unavailable"}


@dataclass(frozen=True)
class Check:
    """A guarantee, the number of items checked, and the violations."""

    name: str
    checked_count: int
    violations: list[str]

    @property
    def passed(self) -> bool:
        return not self.violations


@dataclass
class FinalState:
    """State of the service after all faults are healed and all jobs have ended."""

    edits: list[Resource]
    traces: list[Resource]
    ledger: list[Resource]
    verification: Resource
    model: Resource
    expected_workers: int  #: expected number of serving workers
    queue_leftovers: list[str] = field(default_factory=list)  #: entries and leases left in the queue
    unexpected_exits: list[str] = field(default_factory=list)  #: processes that exited without being killed
    #: reference_key(request, version) -> texts generated without load
    reference_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def reference_key(request: Resource, version: int) -> str:
    return json.dumps([request, version], sort_keys=True)


def run_checks(log: ClientLog, state: FinalState, pool: FactPool) -> list[Check]:
    """Return the result of every check."""
    ledger_view = LedgerView(state.ledger)
    return [
        check_all_jobs_ended(log, state),
        check_failed_jobs(state),
        check_accepted_jobs(log, state),
        check_applied_once(state, ledger_view),
        check_reports_match_ledger(log, state, ledger_view),
        check_texts_reproducible(log, state),
        check_texts_match_ledger(log, ledger_view, pool),
        check_single_version(log),
        check_min_version(log),
        check_stream_text(log),
        check_outcomes(log),
        check_nothing_abandoned(log),
        check_ledger_verifies(state),
        check_one_digest(state),
        check_queue_empty(state),
        check_no_unexpected_exits(state),
    ]


# the ledger, evaluated independently of the service's code


class LedgerView:
    """The active edits of each version, computed from the ledger entries alone."""

    def __init__(self, entries: Sequence[Resource]) -> None:
        self.entries = entries
        self.applied_versions = {e["edit_id"]: e["version"] for e in entries if e["kind"] == "apply"}
        self.reverted_versions = {e["edit_id"]: e["version"] for e in entries if e["kind"] == "revert"}
        self._by_subject: dict[str, list[Resource]] = defaultdict(list)
        for entry in entries:
            if entry["kind"] == "apply":
                self._by_subject[entry["body"]["subject"]].append(entry)

    def active_object(self, subject: str, version: int) -> str | None:
        """Return the object of the newest active edit of a subject at a version; None when none is active."""
        target = None
        for entry in self._by_subject[subject]:
            reverted_at = self.reverted_versions.get(entry["edit_id"])
            if entry["version"] <= version and (reverted_at is None or reverted_at > version):
                target = str(entry["body"]["target_new"])
        return target


# jobs


def check_all_jobs_ended(log: ClientLog, state: FinalState) -> Check:
    """No job is queued or running."""
    jobs = {job["id"]: job["status"] for job in (*state.edits, *state.traces)}
    violations = [f"{job} is {status}" for job, status in jobs.items() if status in PENDING_STATUSES]
    return Check("all jobs have ended", len(jobs), violations)


def check_failed_jobs(state: FinalState) -> Check:
    """Failed jobs have only the allowed error codes."""
    failed = [job for job in (*state.edits, *state.traces) if job["status"] == "failed"]
    violations = [
        f"{job['id']}: {job['error']}"
        for job in failed
        if (job["error"] or {}).get("code") not in ALLOWED_FAILURES
    ]
    return Check(f"failed jobs have only these codes: {', '.join(ALLOWED_FAILURES)}", len(failed), violations)


def check_accepted_jobs(log: ClientLog, state: FinalState) -> Check:
    """Each idempotency key created one job, and it exists. Other jobs come from requests without a response."""
    existing_ids = {job["id"] for job in (*state.edits, *state.traces)}
    violations = [f"{key} created {sorted(ids)}" for key, ids in log.ids_by_key.items() if len(ids) != 1]
    accepted_ids = set().union(*log.ids_by_key.values())
    violations += [f"{job} was accepted and does not exist" for job in sorted(accepted_ids - existing_ids)]
    unaccounted_jobs = len(existing_ids - accepted_ids) - sum(
        " edit" in w or " trace" in w for w in log.abandoned
    )
    if unaccounted_jobs > 0:
        violations.append(f"{unaccounted_jobs} more jobs than keys")
    return Check("each idempotency key has one job", len(log.ids_by_key), violations)


def check_applied_once(state: FinalState, ledger_view: LedgerView) -> Check:
    """No edit has two ledger entries of a kind, and no object is applied by two edits."""
    kinds = Counter((entry["edit_id"], entry["kind"]) for entry in state.ledger)
    violations = [f"{edit}: {count} entries {kind}" for (edit, kind), count in kinds.items() if count > 1]
    applied_targets = Counter(e["body"]["target_new"] for e in state.ledger if e["kind"] == "apply")
    violations += [
        f"{target!r} was applied {count} times" for target, count in applied_targets.items() if count > 1
    ]
    requested_targets = Counter(edit["target_new"] for edit in state.edits)
    violations += [
        f"{target!r} is requested by {count} edits"
        for target, count in requested_targets.items()
        if count > 1
    ]
    return Check("no edit is applied twice", len(ledger_view.entries), violations)


def check_reports_match_ledger(log: ClientLog, state: FinalState, ledger_view: LedgerView) -> Check:
    """Reported and current statuses and versions of edits agree with the ledger."""
    violations: list[str] = []
    for report in log.reported_statuses:
        if report.id.startswith("edit"):
            violations += _ledger_mismatches(
                ledger_view, report.id, report.status, report.version, report.reverted_version
            )
    for edit in state.edits:
        violations += _ledger_mismatches(
            ledger_view, edit["id"], edit["status"], edit["version"], edit["reverted_version"]
        )
    violations += _changed_final_statuses(log, state)
    return Check(
        "reports agree with the ledger",
        len(log.reported_statuses) + len(state.edits),
        sorted(set(violations)),
    )


def _ledger_mismatches(
    ledger_view: LedgerView, edit: str, status: str, version: int | None, reverted: int | None
) -> Iterator[str]:
    if version is not None and ledger_view.applied_versions.get(edit) != version:
        yield f"{edit} was reported applied at {version}, the ledger has {ledger_view.applied_versions.get(edit)}"
    if reverted is not None and ledger_view.reverted_versions.get(edit) != reverted:
        yield f"{edit} was reported reverted at {reverted}, the ledger has {ledger_view.reverted_versions.get(edit)}"
    if status in ("applied", "superseded", "reverted") and version is None:
        yield f"{edit} was reported {status} without a version"
    if status == "reverted" and reverted is None:
        yield f"{edit} was reported reverted without a version"
    if status in ("rejected", "failed", "cancelled") and edit in ledger_view.applied_versions:
        yield f"{edit} was reported {status} and is in the ledger"


def _changed_final_statuses(log: ClientLog, state: FinalState) -> Iterator[str]:
    """Yield jobs whose final status changed, other than from applied to superseded or reverted."""
    current_statuses = {job["id"]: job["status"] for job in (*state.edits, *state.traces)}
    applied_statuses = ("applied", "superseded", "reverted")
    for report in log.reported_statuses:
        if report.status in PENDING_STATUSES or report.id not in current_statuses:
            continue
        if current_statuses[report.id] != report.status and not (
            current_statuses[report.id] in applied_statuses and report.status in applied_statuses
        ):
            yield f"{report.id} was reported {report.status} and is {current_statuses[report.id]}"


# generated texts


def check_texts_reproducible(log: ClientLog, state: FinalState) -> Check:
    """A request repeated without load at the same version gives the same text."""
    violations = []
    for record in log.generations:
        expected = state.reference_texts.get(reference_key(record.request, record.version))
        if expected is None:
            violations.append(f"{_describe(record)}: no reference text")
        elif record.complete and list(record.texts) != list(expected):
            violations.append(
                f"{_describe(record)}: generated {record.texts}, the reference is {list(expected)}"
            )
        elif not record.complete:
            parts = _joined_tokens(record, len(expected))
            if not all(whole.startswith(part) for part, whole in zip(parts, expected, strict=True)):
                violations.append(f"{_describe(record)}: streamed {parts}, the reference is {list(expected)}")
    return Check("texts are reproducible at their version", len(log.generations), violations)


def check_texts_match_ledger(log: ClientLog, ledger_view: LedgerView, pool: FactPool) -> Check:
    """A greedy text begins with the object that is active at its version, and with no other edit's object."""
    violations, checked_count = [], 0
    subject_of = {PROMPT.replace("{}", subject): subject for subject in pool.subjects}
    objects = {e["body"]["target_new"] for e in ledger_view.entries if e["kind"] == "apply"}
    for record in log.generations:
        if not record.complete or record.request.get("temperature"):
            continue
        for prompt, text in zip(record.prompts(), record.texts, strict=True):
            checked_count += 1
            expected = ledger_view.active_object(subject_of[prompt], record.version)
            begins = next((o for o in objects if text.startswith(f" {o}")), None)
            if begins != expected:
                violations.append(
                    f"{_describe(record)}: {prompt!r} gave {text!r}, the ledger has {expected or 'no edit'}"
                )
    return Check("texts begin with the object of their version", checked_count, violations)


def check_single_version(log: ClientLog) -> Check:
    """All tokens of a generation have one version, which is the requested version if there is one."""
    violations = []
    for record in log.generations:
        versions = {record.version, *(token.version for token in record.tokens or ())}
        if len(versions) > 1:
            violations.append(f"{_describe(record)}: tokens of versions {sorted(versions)}")
        if record.pinned_version is not None and record.version != record.pinned_version:
            violations.append(f"{_describe(record)}: version {record.pinned_version} was requested")
    return Check("a generation has one version", len(log.generations), violations)


def check_min_version(log: ClientLog) -> Check:
    """The version of a generation is at least the requested `min_version`."""
    with_min_version = [answer for answer in log.generations if answer.min_version is not None]
    violations = [
        f"{_describe(a)}: min_version was {a.min_version}"
        for a in with_min_version
        if a.version < (a.min_version or 0)
    ]
    return Check("min_version is respected", len(with_min_version), violations)


def check_stream_text(log: ClientLog) -> Check:
    """The tokens of a stream since its last reset form its text."""
    streams = [answer for answer in log.generations if answer.complete and answer.tokens is not None]
    violations = [
        f"{_describe(answer)}: streamed {_joined_tokens(answer, len(answer.texts))}, ended with {list(answer.texts)}"
        for answer in streams
        if _joined_tokens(answer, len(answer.texts)) != list(answer.texts)
    ]
    return Check("streamed tokens form the text", len(streams), violations)


def _joined_tokens(record: GenerationRecord, rows: int) -> list[str]:
    pieces: dict[int, str] = defaultdict(str)
    for token in record.tokens or ():
        pieces[token.index] += token.text
    return [pieces[row] for row in range(max(rows, *(i + 1 for i in pieces), 0))]


def _describe(record: GenerationRecord) -> str:
    return f"{record.client} at version {record.version}"


# HTTP


def check_outcomes(log: ClientLog) -> Check:
    """Every outcome is expected during faults: no 500, and no rejection of a valid request."""
    odd = Counter((a.action, a.outcome) for a in log.attempts if a.outcome not in EXPECTED_OUTCOMES)
    violations = [f"{action}: {outcome} ({count} times)" for (action, outcome), count in odd.items()]
    return Check("responses are 2xx, 429 or 503", len(log.attempts), violations)


def check_nothing_abandoned(log: ClientLog) -> Check:
    """Every retried request succeeds in the end, and no client raised an unexpected exception."""
    return Check("retried requests succeed", len(log.ids_by_key), log.abandoned + log.anomalies)


# the service


def check_ledger_verifies(state: FinalState) -> Check:
    """`GET /ledger/verify` reports no finding."""
    violations = [json.dumps(finding) for finding in state.verification["findings"]]
    if not state.verification["ok"] and not violations:
        violations = ["not ok without a finding"]
    return Check("the ledger verifies", len(state.ledger), violations)


def check_one_digest(state: FinalState) -> Check:
    """Every worker serves head, and all have the same digest."""
    head, serving = state.model["head"], state.model["workers"]
    serving = [worker for worker in serving if worker.get("state", "serving") == "serving"]
    violations = [f"{w['id']} serves {w['version']}, head is {head}" for w in serving if w["version"] != head]
    if len(serving) != state.expected_workers:
        violations.append(f"{len(serving)} of {state.expected_workers} workers serve")
    digests = {worker["digest"] for worker in serving}
    if len(digests) != 1 or None in digests:
        violations.append(f"digests at head: {sorted(map(str, digests))}")
    return Check("workers have one digest at head", len(serving), violations)


def check_queue_empty(state: FinalState) -> Check:
    """The queue has no entries and no leases."""
    return Check("the queue is empty", 1, list(state.queue_leftovers))


def check_no_unexpected_exits(state: FinalState) -> Check:
    """No process exited without being killed."""
    return Check("no process exited unexpectedly", 1, list(state.unexpected_exits))


def all_passed(checks: Iterable[Check]) -> bool:
    return all(check.passed for check in checks)
