"""What workers say of their weights, and whose word holds when they differ.

Equal states have equal bytes on one kind of device, so all that was said of one state there is one vote. Functions on a
session: whoever votes holds the ledger's lock, so that two who differ cannot miss each other.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta

from sqlalchemy import and_, select, update
from sqlalchemy.orm import Session

from service.db.models import Attestation, LedgerEntry, Worker, now
from service.jobs import worker_registry
from service.ledger.ledger import state_of


def attest(session: Session, model: str, version: int, worker: str, digest: str, device: str) -> None:
    """The weights at this version have this digest at this worker."""
    before = session.get(Attestation, (model, version, worker))
    if before and (before.digest, before.device, before.withdrawn) == (digest, device, None):
        return  # the first time counts
    row = {"digest": digest, "device": device, "at": now(), "withdrawn": None}
    session.merge(Attestation(model=model, version=version, worker=worker, **row))
    session.flush()


def reference(session: Session, model: str, version: int, device: str, lease: timedelta) -> str | None:
    """The digest that holds for a version's state: the one that most workers attest, of several the first.

    Living workers count before those that are gone. So nobody is outvoted for ever by what is no more: when all
    workers are stopped and others are started (with other libraries, say), the new ones agree among themselves.
    """
    voters = and_(Worker.id == Attestation.worker, worker_registry.living(lease))
    said = (
        select(Attestation.digest, Attestation.worker, Worker.id.is_not(None).label("lives"))
        .outerjoin(Worker, voters)
        .where(
            Attestation.model == model,
            Attestation.device == device,
            Attestation.version.in_(_alike(session, model, version)),
            Attestation.withdrawn.is_(None),
        )
        .order_by(Attestation.at)
    )
    living: dict[str, set[str]] = defaultdict(set)
    ever: dict[str, set[str]] = defaultdict(set)
    for digest, worker, lives in session.execute(said):
        ever[digest].add(worker)
        living[digest].update([worker] if lives else [])
    return max(ever, key=lambda digest: (len(living[digest]), len(ever[digest])), default=None)


def withdraw(session: Session, model: str, worker: str) -> None:
    """What this worker attested counts no longer, and stays to be read."""
    mine = (Attestation.model == model, Attestation.worker == worker, Attestation.withdrawn.is_(None))
    session.execute(update(Attestation).where(*mine).values(withdrawn=now()))


def _alike(session: Session, model: str, version: int) -> set[int]:
    """The versions with the same state as this one."""
    base = state_of(model, [])
    states = select(LedgerEntry.state).where(LedgerEntry.model == model, LedgerEntry.version == version)
    state = session.scalar(states) if version else base
    same = select(LedgerEntry.version).where(LedgerEntry.model == model, LedgerEntry.state == state)
    return {version, *session.scalars(same)} | ({0} if state == base else set())
