"""Does the ledger still say what it said? Every hash is computed again, and all that hangs on it is compared."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.db.models import Attestation, Factors, Job
from service.ledger.ledger import APPLY, GENESIS, Entry, active, active_entries, chain_hash, entries, state_of


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written: in the chain, the factors, the states, the statuses or the replicas."""

    where: str
    version: int | None
    detail: str


def verify(session: Session, model: str) -> list[Finding]:
    """Everything that is wrong with a model's ledger; empty when all is well."""
    try:
        chain = entries(session, model)
    except ValueError as error:
        return [Finding("chain", None, f"an entry can no longer be read: {error}")]
    broken = list(_chain(chain))
    sound = chain[: broken[0].version - 1 if broken and broken[0].version else 0] if broken else chain
    found = [
        *broken,
        *_factors(session, sound),
        *_states(model, sound),
        *_jobs(session, model, chain, not broken),
    ]
    return [*found, *_replicas(session, model, sound, complete=not broken)]


def _chain(chain: list[Entry]) -> Iterator[Finding]:
    previous = GENESIS
    for expected, entry in enumerate(chain, start=1):
        if entry.version != expected:
            yield Finding("chain", expected, f"entry {expected} is missing")
            return
        if entry.previous != previous:
            yield Finding("chain", expected, f"entry {expected} does not follow the entry before it")
        elif entry.hash != chain_hash(entry.previous, entry):
            yield Finding("chain", expected, f"entry {expected} was changed after it was written")
        previous = entry.hash


def _factors(session: Session, chain: list[Entry]) -> Iterator[Finding]:
    for entry in chain:
        if entry.kind != APPLY:
            continue
        factors = session.get(Factors, entry.edit_id)
        if factors is None:
            yield Finding("factors", entry.version, f"the factors of {entry.edit_id} are missing")
        elif (
            not hashlib.sha256(factors.data).hexdigest() == factors.sha256 == entry.body.get("factors_sha256")
        ):
            yield Finding("factors", entry.version, f"the factors of {entry.edit_id} were changed")


def _states(model: str, chain: list[Entry]) -> Iterator[Finding]:
    for entry in chain:
        if entry.state != state_of(model, active_entries(chain, entry.version)):
            yield Finding(
                "state", entry.version, f"the state of version {entry.version} is not that of its edits"
            )


def _jobs(session: Session, model: str, chain: list[Entry], sound: bool) -> Iterator[Finding]:
    """The rows of edits and the ledger tell one story; a ledger whose end was cut off is found here."""
    landed = select(Job).where(
        Job.model == model,
        Job.kind == "edit",
        or_(Job.version.is_not(None), Job.reverted_version.is_not(None)),
    )
    said = {
        (job.id, kind): at
        for job in session.scalars(landed)
        for kind, at in (("apply", job.version), ("revert", job.reverted_version))
        if at is not None
    }
    written = {(entry.edit_id, entry.kind): entry.version for entry in chain}
    for edit_id, kind in sorted(said.keys() | written.keys()):
        if (at := said.get((edit_id, kind))) != (entry := written.get((edit_id, kind))):
            yield Finding(
                "chain", entry or at, f"the ledger has the {kind} of {edit_id} at {entry}, its edit at {at}"
            )
    if not sound:
        return
    standing, reverted = set(active(chain)), {e.edit_id for e in chain if e.kind != APPLY}
    for job in session.scalars(landed):
        right = "reverted" if job.id in reverted else "applied" if job.id in standing else "superseded"
        if job.status != right:
            yield Finding("status", job.version, f"{job.id} is called {job.status} and is {right}")


def _replicas(session: Session, model: str, chain: list[Entry], complete: bool) -> Iterator[Finding]:
    """On one kind of device equal states have equal bytes, whichever worker and whichever version."""
    states = {0: state_of(model, [])} | {entry.version: entry.state for entry in chain}
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
            yield Finding(
                "replicas",
                row.version,
                f"{row.worker} stood at version {row.version}, which the ledger lacks",
            )
    for (_, device), by_digest in digests.items():
        if len(by_digest) > 1:
            who = ", ".join(f"{r.worker} at {r.version}: {r.digest[:12]}" for r in by_digest.values())
            yield Finding(
                "replicas", max(r.version for r in by_digest.values()), f"weights differ on {device}: {who}"
            )
