"""Verification of a ledger: recompute every hash and compare factors, states, job rows and attested digests."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from service.db.models import Attestation, Job, LedgerHead, StoredFactors
from service.ledger.active_set import state_hashes
from service.ledger.ledger import (
    APPLY,
    GENESIS_HASH,
    Entry,
    active_edit_ids,
    active_edits,
    chain_hash,
    entries,
    state_hash,
)


@dataclass(frozen=True)
class LedgerFinding:
    """An inconsistency in the chain, the factors, the states, the statuses or the replicas."""

    where: str
    version: int | None
    detail: str


#: model -> version and hash of the newest entry up to which all states were correct
VerifiedStates = dict[str, tuple[int, str]]

FACTORS_ROUNDS = 16  #: verifications in which all factors that were verified before are read again


class VerifiedFactors:
    """The factors that earlier verifications of this process have read and hashed.

    New factors are always read. Of the others each verification reads those that were read longest ago, a part of
    1 / FACTORS_ROUNDS.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[str, int]] = {}  # edit id -> sha256 and length, least recently read first

    def choose(self, stored: dict[str, tuple[str, int]], read_all: bool) -> set[str]:
        """Return the edits whose factors must be read, given the sha256 and length of all."""
        verified = [edit for edit, values in self._read.items() if stored.get(edit) == values]
        new = stored.keys() - set(verified)
        return set(stored) if read_all else new | set(verified[: -(-len(verified) // FACTORS_ROUNDS)])

    def add(self, edit: str, stored: tuple[str, int]) -> None:
        """Remember factors that were read and are correct."""
        self._read.pop(edit, None)
        self._read[edit] = stored

    def discard(self, edit: str) -> None:
        """Forget factors that were read and are not correct: the next verification reads them again."""
        self._read.pop(edit, None)


def verify_ledger(
    session: Session,
    model: str,
    verified: VerifiedStates | None = None,
    factors: VerifiedFactors | None = None,
    full: bool = False,
) -> list[LedgerFinding]:
    """Return all inconsistencies of a model's ledger.

    `verified` and `factors` are kept by the caller from one call to the next. The state of a version depends on the
    entries up to it alone, and the chain of hashes shows that they are the same entries: only states of later versions
    are computed. `full` reads the bytes of all factors.
    """
    verified = {} if verified is None else verified
    factors = VerifiedFactors() if factors is None else factors
    try:
        chain = entries(session, model)
    except ValueError as error:
        return [LedgerFinding("chain", None, f"an entry cannot be parsed: {error}")]
    chain_findings = list(_check_chain(chain))
    intact = (
        chain[: chain_findings[0].version - 1 if chain_findings and chain_findings[0].version else 0]
        if chain_findings
        else chain
    )
    findings = [
        *chain_findings,
        *_check_factors(session, intact, factors, full),
        *_check_states(model, intact, verified),
        *(() if chain_findings else _check_head(session, model, chain)),
        *_check_jobs(session, model, chain, not chain_findings),
    ]
    return [*findings, *_check_replicas(session, model, intact, complete=not chain_findings)]


def _check_chain(chain: list[Entry]) -> Iterator[LedgerFinding]:
    previous = GENESIS_HASH
    for expected, entry in enumerate(chain, start=1):
        if entry.version != expected:
            yield LedgerFinding("chain", expected, f"entry {expected} is missing")
            return
        if entry.previous != previous:
            yield LedgerFinding("chain", expected, f"entry {expected} does not follow the entry before it")
        elif entry.hash != chain_hash(entry.previous, entry):
            yield LedgerFinding("chain", expected, f"entry {expected} was changed after it was written")
        previous = entry.hash


def _check_factors(
    session: Session, chain: list[Entry], verified: VerifiedFactors, full: bool
) -> Iterator[LedgerFinding]:
    applied = {entry.edit_id: entry for entry in chain if entry.kind == APPLY}
    columns = select(StoredFactors.edit_id, StoredFactors.sha256, func.length(StoredFactors.data))
    stored = {row[0]: (row[1], row[2]) for row in session.execute(columns) if row[0] in applied}
    due = verified.choose(stored, full)
    for edit, entry in applied.items():
        if edit not in stored:
            yield LedgerFinding("factors", entry.version, f"the factors of {edit} are missing")
        elif stored[edit][0] != entry.body.get("factors_sha256") or (
            edit in due and _hash_of_factors(session, edit) != stored[edit][0]
        ):
            verified.discard(edit)
            yield LedgerFinding("factors", entry.version, f"the factors of {edit} were changed")
        elif edit in due:
            verified.add(edit, stored[edit])


def _hash_of_factors(session: Session, edit: str) -> str:
    """Return sha256 of the bytes of an edit's factors, one edit at a time: all of them may not fit in memory."""
    data = session.scalar(select(StoredFactors.data).where(StoredFactors.edit_id == edit))
    return hashlib.sha256(data or b"").hexdigest()


def _check_states(model: str, chain: list[Entry], verified: VerifiedStates) -> Iterator[LedgerFinding]:
    version, known_hash = verified.get(model, (0, ""))
    if not 0 < version <= len(chain) or chain[version - 1].hash != known_hash:
        version = 0
    all_correct = True
    for entry, state in state_hashes(model, chain, after=version):
        if entry.state != state:
            all_correct = False
            yield LedgerFinding(
                "state",
                entry.version,
                f"the state of version {entry.version} does not match its active edits",
            )
    if all_correct and chain:
        verified[model] = (chain[-1].version, chain[-1].hash)


def _check_head(session: Session, model: str, chain: list[Entry]) -> Iterator[LedgerFinding]:
    """Check the stored active edits of the head. A row of another version is not used by an append, and not checked."""
    row = session.get(LedgerHead, model, populate_existing=True)
    if row is None or not chain or (row.version, row.hash) != (chain[-1].version, chain[-1].hash):
        return
    if row.active != active_edits(chain):
        yield LedgerFinding(
            "state", row.version, "the stored active edits of the head are not those of the ledger"
        )


def _check_jobs(
    session: Session, model: str, chain: list[Entry], chain_intact: bool
) -> Iterator[LedgerFinding]:
    """Compare the rows of edits with the ledger. A ledger that was truncated at the end is found here."""
    committed = select(Job).where(
        Job.model == model,
        Job.kind == "edit",
        or_(Job.version.is_not(None), Job.reverted_version.is_not(None)),
    )
    job_versions = {
        (job.id, kind): at
        for job in session.scalars(committed)
        for kind, at in (("apply", job.version), ("revert", job.reverted_version))
        if at is not None
    }
    ledger_versions = {(entry.edit_id, entry.kind): entry.version for entry in chain}
    for edit_id, kind in sorted(job_versions.keys() | ledger_versions.keys()):
        if (at := job_versions.get((edit_id, kind))) != (entry := ledger_versions.get((edit_id, kind))):
            yield LedgerFinding(
                "chain", entry or at, f"the ledger has the {kind} of {edit_id} at {entry}, its edit at {at}"
            )
    if not chain_intact:
        return
    active_ids, reverted = set(active_edit_ids(chain)), {e.edit_id for e in chain if e.kind != APPLY}
    for job in session.scalars(committed):
        expected = "reverted" if job.id in reverted else "applied" if job.id in active_ids else "superseded"
        if job.status != expected:
            yield LedgerFinding(
                "status", job.version, f"{job.id} has the status {job.status} instead of {expected}"
            )


def _check_replicas(
    session: Session, model: str, chain: list[Entry], complete: bool
) -> Iterator[LedgerFinding]:
    """Check that all digests of one state on one kind of device are equal, over workers and versions."""
    states = {0: state_hash(model, [])} | {entry.version: entry.state for entry in chain}
    digests: dict[tuple[str, str], dict[str, Attestation]] = defaultdict(dict)
    rows = (
        select(Attestation)
        .where(Attestation.model == model, Attestation.withdrawn.is_(None))
        .order_by(Attestation.version, Attestation.worker)
    )
    for row in session.scalars(rows):
        if row.version in states:
            digests[states[row.version], row.device].setdefault(row.digest, row)
        elif complete:
            yield LedgerFinding(
                "replicas",
                row.version,
                f"{row.worker} attested version {row.version}, which is not in the ledger",
            )
    for (_, device), by_digest in digests.items():
        if len(by_digest) > 1:
            who = ", ".join(f"{r.worker} at {r.version}: {r.digest[:12]}" for r in by_digest.values())
            yield LedgerFinding(
                "replicas", max(r.version for r in by_digest.values()), f"weights differ on {device}: {who}"
            )
