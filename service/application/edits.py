"""Edits: asked for, looked at, taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.application.job_queue import Idempotency, JobQueue, get_job, new_job_row
from service.application.served_model import ServedModel
from service.application.validation import error_path, resolve_methods, validate_edit
from service.db.models import Model, StoredFactors
from service.errors import Conflict, InvalidInput
from service.jobs.views import EDIT_STATUSES, ResourceDict
from service.kit.text import fact_key, normalize_whitespace
from service.schemas import EditRequest


class EditService:
    """Jobs that change what the model says."""

    def __init__(self, queue: JobQueue, served_model: ServedModel) -> None:
        self.queue, self.served_model = queue, served_model

    def submit(
        self,
        requests: Sequence[EditRequest],
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> list[ResourceDict]:
        """Queue edits, all or none. The same key and body again gives the same edits again.

        `max_queued` jobs of this actor may wait at once; the settings say how many when it is left out.
        """
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous
        model, tokenizer, _ = self.served_model.current()
        requests = resolve_methods(requests, model)
        for number, request in enumerate(requests):
            with error_path(f"edits.{number}" if len(requests) > 1 else ""):
                validate_edit(request, model, tokenizer)
        jobs = [new_edit_row(model, request, actor) for request in requests]
        return self.queue.submit(jobs, model, actor, idempotency, max_queued)

    def get(self, edit_id: str) -> ResourceDict:
        return self.queue.get("edit", edit_id)

    def page(
        self,
        status: str | None = None,
        subject: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> ResourceDict:
        """{"items": newest first, "next": cursor or None}."""
        if status is not None and status not in EDIT_STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(EDIT_STATUSES)}.", "status")
        return self.queue.page(
            "edit",
            cursor,
            limit,
            status=status,
            subject=None if subject is None else normalize_whitespace(subject),
        )

    def revert(self, edit_id: str, actor: str) -> ResourceDict:
        """Take an edit back, whatever it has come to; harmless when there is nothing to take back."""
        return self.queue.cancel_or_revert("edit", edit_id, actor)

    def delta(self, edit_id: str) -> bytes:
        """The edit's vectors as safetensors."""
        with self.queue.database.read_session() as session:
            job = get_job(session, "edit", edit_id)
            factors = session.get(StoredFactors, edit_id)
            if factors is None:
                raise Conflict(f"{edit_id} is {job.status}: only an edit that was applied has vectors.")
            return factors.data


def new_edit_row(model: Model, request: EditRequest, actor: str) -> dict[str, Any]:
    return new_job_row("edit", model, request.model_dump(mode="json"), actor) | {
        "subject": normalize_whitespace(request.subject),
        "fact_key": fact_key(request.subject, request.prompt),
        "dry_run": request.dry_run,
    }
