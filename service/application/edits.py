"""Edits: asked for, looked at, taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.application.job_queue import Idempotency, Queue, draft, find
from service.application.served_model import Resident
from service.application.validation import check_edit, place, with_methods
from service.db.models import Factors, Model
from service.errors import Conflict, InvalidInput
from service.jobs.views import EDIT_STATUSES, Resource
from service.kit.text import fact_key, words
from service.schemas import EditRequest


class Edits:
    """Jobs that change what the model says."""

    def __init__(self, queue: Queue, resident: Resident) -> None:
        self.queue, self.resident = queue, resident

    def submit(
        self,
        requests: Sequence[EditRequest],
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> list[Resource]:
        """Queue edits, all or none. The same key and body again gives the same edits again.

        `max_queued` jobs of this actor may wait at once; the settings say how many when it is left out.
        """
        if (known := self.queue.known(actor, idempotency)) is not None:
            return known
        model, tokenizer, _ = self.resident.at_head()
        requests = with_methods(requests, model)
        for number, request in enumerate(requests):
            with place(f"edits.{number}" if len(requests) > 1 else ""):
                check_edit(request, model, tokenizer)
        jobs = [edit_draft(model, request, actor) for request in requests]
        return self.queue.submit(jobs, model, actor, idempotency, max_queued)

    def get(self, edit_id: str) -> Resource:
        return self.queue.one("edit", edit_id)

    def page(
        self,
        status: str | None = None,
        subject: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Resource:
        """{"items": newest first, "next": cursor or None}."""
        if status is not None and status not in EDIT_STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(EDIT_STATUSES)}.", "status")
        return self.queue.page(
            "edit", cursor, limit, status=status, subject=None if subject is None else words(subject)
        )

    def revert(self, edit_id: str, actor: str) -> Resource:
        """Take an edit back, whatever it has come to; harmless when there is nothing to take back."""
        return self.queue.take_back("edit", edit_id, actor)

    def delta(self, edit_id: str) -> bytes:
        """The edit's vectors as safetensors."""
        with self.queue.database.read() as session:
            job = find(session, "edit", edit_id)
            factors = session.get(Factors, edit_id)
            if factors is None:
                raise Conflict(f"{edit_id} is {job.status}: only an edit that was applied has vectors.")
            return factors.data


def edit_draft(model: Model, request: EditRequest, actor: str) -> dict[str, Any]:
    return draft("edit", model, request.model_dump(mode="json"), actor) | {
        "subject": words(request.subject),
        "fact_key": fact_key(request.subject, request.prompt),
        "dry_run": request.dry_run,
    }
