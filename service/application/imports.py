"""Imports: queue the edits of an edit set with their factors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.application import edit_set
from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.edit_set import ImportedEdit
from service.application.edits import new_edit_row
from service.application.job_queue import Idempotency, JobQueue, save_idempotency_key
from service.application.served_model import ServedModel
from service.application.validation import error_path, validate_edit
from service.db.models import Job, Model, StoredFactors
from service.jobs import artifacts, views
from service.jobs.views import OPEN_STATUSES, ResourceDict
from service.kit.safetensors_io import ReadableFile
from service.kit.text import normalize_whitespace
from service.ledger import ledger


class ImportService:
    """Imports edit sets of other ledgers."""

    def __init__(self, queue: JobQueue, served_model: ServedModel) -> None:
        self.queue, self.served_model = queue, served_model

    def submit(
        self,
        source: ReadableFile | bytes,
        actor: str,
        idempotency: Idempotency | None = None,
        limits: CallerLimits = DEFAULT_LIMITS,
    ) -> tuple[list[ResourceDict], list[str]]:
        """Queue the edits of an edit set, all or none, without those that are already present.

        Return all edits in the order of the file, and the ids of those that were present.
        """
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous, [edit["id"] for edit in previous]
        model, encoder, _ = self.served_model.current()
        max_edit_size = self.queue.settings.max_import_body // 3
        imported = edit_set.read_edit_set(source, model.fingerprint, model.info, max_edit_size)
        for g in imported:
            with error_path(f"edits.{g.edit.origin.edit}"):
                validate_edit(g.request, model, encoder)
        try:
            with self.queue.database.write_session() as session:
                ledger.lock_ledger(
                    session, model.fingerprint
                )  # a concurrent import of the same edits waits and finds these
                present = _find_present(session, model, imported)
                jobs = {
                    g.identity: _new_imported_row(model, g, actor)
                    for g in imported
                    if g.identity not in present
                }
                ids = [
                    present[g.identity] if g.identity in present else str(jobs[g.identity]["id"])
                    for g in imported
                ]
                self.queue.insert_jobs(session, list(jobs.values()), model, actor, limits, {})
                new = {g.identity: g for g in imported if g.identity in jobs}
                for identity, g in new.items():
                    _insert_artifacts(session, str(jobs[identity]["id"]), g)
                _store_shared(session, new.values())
                if idempotency is not None:
                    save_idempotency_key(session, actor, idempotency, ids)
                rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))}
                created = views.serialize_many(session, [rows[edit_id] for edit_id in ids])
        except IntegrityError:  # a concurrent request with the same key was first
            previous = self.queue.find_by_idempotency_key(actor, idempotency)
            if previous is None:
                raise
            return previous, [edit["id"] for edit in previous]
        self.queue.notify_workers(list(jobs.values()))
        return created, sorted(present.values())


def _find_present(
    session: Session, model: Model, imported: Sequence[ImportedEdit]
) -> dict[tuple[str, str], str]:
    """Return the edits of a file that are open, active or superseded here: identity -> id."""
    subjects = {normalize_whitespace(g.request.subject) for g in imported}
    query = (
        select(Job.id, Job.fact_key, Job.request, StoredFactors.sha256)
        .outerjoin(StoredFactors, StoredFactors.edit_id == Job.id)
        .where(
            Job.model == model.fingerprint,
            Job.kind == "edit",
            Job.subject.in_(subjects),
            Job.status.in_((*OPEN_STATUSES, "applied", "superseded")),
        )
        .order_by(Job.id)
    )
    identities = {g.identity for g in imported}
    present: dict[tuple[str, str], str] = {}
    for row in session.execute(query):
        name = row.fact_key, row.sha256 or (row.request.get("origin") or {}).get("factors_sha256")
        if name in identities:
            present.setdefault(name, row.id)
    return present


def _new_imported_row(model: Model, imported: ImportedEdit, actor: str) -> dict[str, Any]:
    job = new_edit_row(model, imported.request, actor)
    return job | {"request": {**job["request"], "origin": imported.origin}}


def _insert_artifacts(session: Session, job_id: str, imported: ImportedEdit) -> None:
    """Store what the worker needs. The tensors of one edit are in memory at a time."""
    artifacts.insert_artifact(session, job_id, artifacts.IMPORTED_FACTORS, imported.read_factors())
    artifacts.insert_artifact(session, job_id, artifacts.IMPORTED_BODY, json.dumps(imported.body).encode())


def _store_shared(session: Session, imported: Iterable[ImportedEdit]) -> None:
    """Store the gate spaces and classifiers of edits, each once, where the workers read them. One is in memory at a
    time. It stays stored when its edits are rejected; it has no effect by itself."""
    holders = {digest: g for g in imported for digest in g.shared}
    for digest in sorted(holders):
        if not ledger.has_gate_space(session, digest):
            ledger.put_gate_space(session, digest, holders[digest].read_shared(digest))
