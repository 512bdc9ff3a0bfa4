"""Imports: edits that another ledger made, queued to land here as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.application import edit_set
from service.application.edit_set import Given
from service.application.edits import edit_draft
from service.application.job_queue import Idempotency, Queue, remember
from service.application.served_model import Resident
from service.application.validation import check_edit, place
from service.db.models import Factors, Job, Model
from service.jobs import artifacts, views
from service.jobs.views import OPEN, Resource
from service.kit.text import words
from service.ledger import ledger


class Imports:
    """What comes into the house."""

    def __init__(self, queue: Queue, resident: Resident) -> None:
        self.queue, self.resident = queue, resident

    def submit(
        self,
        data: bytes,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> tuple[list[Resource], list[str]]:
        """Queue the edits of a file that another ledger made, all or none; those that are here already are left alone. All of them,
        in the order of the file, and the ids of those that were here."""
        if (known := self.queue.known(actor, idempotency)) is not None:
            return known, [edit["id"] for edit in known]
        model, tokenizer, _ = self.resident.at_head()
        given = edit_set.read(data, model.fingerprint, model.info)
        for g in given:
            with place(f"edits.{g.edit.origin.edit}"):
                check_edit(g.request, model, tokenizer)
        try:
            with self.queue.database.session() as session:
                ledger.lock(
                    session, model.fingerprint
                )  # who imports the same beside us waits, and finds ours
                here = _here(session, model, given)
                jobs = {g.name: _given_draft(model, g, actor) for g in given if g.name not in here}
                kept = {jobs[g.name]["id"]: _parts_of(g) for g in given if g.name in jobs}
                ids = [here[g.name] if g.name in here else str(jobs[g.name]["id"]) for g in given]
                self.queue.add(session, list(jobs.values()), model, actor, max_queued, kept)
                if idempotency is not None:
                    remember(session, actor, idempotency, ids)
                rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))}
                answer = views.several(session, [rows[edit_id] for edit_id in ids])
        except IntegrityError:  # the same key came in beside us, and was first
            known = self.queue.known(actor, idempotency)
            if known is None:
                raise
            return known, [edit["id"] for edit in known]
        self.queue.ring(list(jobs.values()))
        return answer, sorted(here.values())


def _here(session: Session, model: Model, given: Sequence[Given]) -> dict[tuple[str, str], str]:
    """Of edits of a file those that have landed here and were not reverted, or are about to: their names -> ids here."""
    subjects = {words(g.request.subject) for g in given}
    known = (
        select(Job.id, Job.fact_key, Job.request, Factors.sha256)
        .outerjoin(Factors, Factors.edit_id == Job.id)
        .where(
            Job.model == model.fingerprint,
            Job.kind == "edit",
            Job.subject.in_(subjects),
            Job.status.in_((*OPEN, "applied", "superseded")),
        )
        .order_by(Job.id)
    )
    wanted = {g.name for g in given}
    found: dict[tuple[str, str], str] = {}
    for row in session.execute(known):
        name = row.fact_key, row.sha256 or (row.request.get("origin") or {}).get("factors_sha256")
        if name in wanted:
            found.setdefault(name, row.id)
    return found


def _given_draft(model: Model, given: Given, actor: str) -> dict[str, Any]:
    job = edit_draft(model, given.request, actor)
    return job | {"request": {**job["request"], "origin": given.origin}}


def _parts_of(given: Given) -> dict[str, bytes]:
    return {artifacts.FACTORS: given.factors, artifacts.BODY: json.dumps(given.body).encode()}
