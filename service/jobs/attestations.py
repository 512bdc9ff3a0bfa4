"""Attested weight digests of workers, and the majority vote when they differ.

Equal states have equal bytes on one kind of device, so all attestations of one state and one device are one vote. A
caller that attests holds the ledger's lock, so that two workers that differ see each other's attestation.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta

from sqlalchemy import Select, and_, delete, func, select, tuple_, update
from sqlalchemy.orm import Session

from service.db.models import Attestation, LedgerEntry, Worker, now
from service.jobs import worker_registry
from service.ledger import audit
from service.ledger.audit_coverage import ATTESTATION
from service.ledger.ledger import state_hash

PRUNED_WORKERS = 10  #: workers whose attestations one transaction deletes at most


def attest(session: Session, model: str, version: int, worker: str, digest: str, device: str) -> None:
    """Record the digest of a worker's weights at a version."""
    before = session.get(Attestation, (model, version, worker))
    if before and (before.digest, before.device, before.withdrawn) == (digest, device, None):
        return  # the time of the first attestation counts
    row = {"digest": digest, "device": device, "at": now(), "withdrawn": None}
    session.merge(Attestation(model=model, version=version, worker=worker, **row))
    audit.append(session, ATTESTATION, [(model, version, worker)])


def majority_digest(session: Session, model: str, version: int, device: str, lease: timedelta) -> str | None:
    """Return the digest that most workers attest for a version's state; of several such digests the earliest.

    Live workers take precedence over dead ones: when all workers are replaced by others, with other library versions
    for example, the new workers are not outvoted by the old ones.
    """
    voted_by_alive = and_(Worker.id == Attestation.worker, worker_registry.alive(lease))
    query = (
        select(Attestation.digest, Attestation.worker, Worker.id.is_not(None).label("lives"))
        .outerjoin(Worker, voted_by_alive)
        .where(
            Attestation.model == model,
            Attestation.device == device,
            Attestation.version.in_(_versions_with_same_state(session, model, version)),
            Attestation.withdrawn.is_(None),
        )
        .order_by(Attestation.at)
    )
    alive_voters: dict[str, set[str]] = defaultdict(set)
    all_voters: dict[str, set[str]] = defaultdict(set)
    for digest, worker, is_alive in session.execute(query):
        all_voters[digest].add(worker)
        alive_voters[digest].update([worker] if is_alive else [])
    return max(
        all_voters, key=lambda digest: (len(alive_voters[digest]), len(all_voters[digest])), default=None
    )


def withdraw_attestations(session: Session, model: str, worker: str) -> None:
    """Mark the attestations of a worker as withdrawn. They stay readable and no longer count."""
    conditions = (Attestation.model == model, Attestation.worker == worker, Attestation.withdrawn.is_(None))
    versions = session.scalars(
        select(Attestation.version).where(*conditions).order_by(Attestation.version)
    ).all()
    session.execute(update(Attestation).where(*conditions).values(withdrawn=now()))
    audit.append(session, ATTESTATION, [(model, version, worker) for version in versions])


def prune_attestations(session: Session, before: datetime) -> int:
    """Delete the attestations of workers that are gone and attested nothing since a time. Return their number.

    One call deletes those of at most PRUNED_WORKERS workers. An audit record names the workers, so that verification
    accepts the deletion.
    """
    rows = session.execute(_gone_workers(before).limit(PRUNED_WORKERS))
    workers = [(row.model, row.worker) for row in rows]
    if not workers:
        return 0
    condition = tuple_(Attestation.model, Attestation.worker).in_(workers)
    count = session.scalar(select(func.count()).select_from(Attestation).where(condition)) or 0
    session.execute(delete(Attestation).where(condition))
    audit.append_removal(session, workers)
    return count


def count_prunable_attestations(session: Session, before: datetime) -> int:
    """Return the number of attestations that `prune_attestations` would delete, called until it deletes none."""
    counts = _gone_workers(before).add_columns(func.count().label("attestations"))
    return sum(row.attestations for row in session.execute(counts))


def _gone_workers(before: datetime) -> Select[str, str]:
    """Return the query for the pairs of a model and a worker that is gone and attested nothing since a time."""
    pair = (Attestation.model, Attestation.worker)
    return (
        select(*pair)
        .outerjoin(Worker, Worker.id == Attestation.worker)
        .where(Worker.id.is_(None))
        .group_by(*pair)
        .having(func.max(Attestation.at) < before)
        .order_by(*pair)
    )


def _versions_with_same_state(session: Session, model: str, version: int) -> set[int]:
    """Return the versions with the same state as this one, itself included."""
    base = state_hash(model, [])
    states = select(LedgerEntry.state).where(LedgerEntry.model == model, LedgerEntry.version == version)
    state = session.scalar(states) if version else base
    same = select(LedgerEntry.version).where(LedgerEntry.model == model, LedgerEntry.state == state)
    return {version, *session.scalars(same)} | ({0} if state == base else set())
