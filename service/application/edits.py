"""Edits: submit one or several, filter the list, revert, and read the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.conversations import ConversationRenderer
from service.application.job_queue import Idempotency, get_job, new_job_row
from service.application.job_resource import JobResourceService
from service.application.validation import error_path, resolve_methods, validate_edit
from service.db.models import Model, StoredFactors
from service.errors import Conflict, InvalidInput
from service.jobs.views import EDIT_STATUSES, ResourceDict
from service.kit.text import normalize_whitespace
from service.schemas import EditRequest


class EditService(JobResourceService):
    """Jobs that change a fact of the model."""

    def submit(  # type: ignore[override]  # edits are submitted in lists
        self,
        request: Sequence[EditRequest],
        actor: str,
        idempotency: Idempotency | None = None,
        limits: CallerLimits = DEFAULT_LIMITS,
    ) -> list[ResourceDict]:
        """Queue several edits in one transaction: all, or none if one is invalid.

        A repeated idempotency key with the same body returns the edits that it created.
        """
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous
        model, encoder, _ = self.served_model.current()
        renderer, requests = ConversationRenderer(self.served_model), list[EditRequest]()
        for number, edit in enumerate(resolve_methods(request, model)):
            with error_path(f"edits.{number}" if len(request) > 1 else ""):
                requests.append(renderer.render_edit(edit))
                validate_edit(requests[-1], model, encoder)
        jobs = [new_edit_row(model, edit, actor) for edit in requests]
        return self.queue.submit(jobs, model, actor, idempotency, limits)

    def page(self, cursor: str | None = None, limit: int = 50, **filters: str | None) -> ResourceDict:
        """Return {"items": newest first, "next": cursor or None}, filtered by `status` and `subject`."""
        status, subject = filters.get("status"), filters.get("subject")
        if status is not None and status not in EDIT_STATUSES:
            raise InvalidInput(f"`status` must be one of {', '.join(EDIT_STATUSES)}.", "status")
        normalized_subject = None if subject is None else normalize_whitespace(subject)
        return super().page(cursor, limit, status=status, subject=normalized_subject)

    def revert(self, edit_id: str, actor: str) -> ResourceDict:
        """Revert an applied edit, or cancel an open one. Has no effect on any other edit."""
        return self.cancel(edit_id, actor)

    def delta(self, edit_id: str) -> bytes:
        """Return the factors of an edit as safetensors. Raises Conflict if the edit was never applied."""
        with self.queue.database.read_session() as session:
            job = get_job(session, self.kind.name, edit_id)
            factors = session.get(StoredFactors, edit_id)
            if factors is None:
                raise Conflict(f"{edit_id} is {job.status}: only an applied edit has factors.")
            return factors.data


def new_edit_row(model: Model, request: EditRequest, actor: str) -> dict[str, Any]:
    """Return the row of a new edit."""
    return new_job_row("edit", model, request.model_dump(mode="json"), actor) | {
        "subject": normalize_whitespace(request.subject),
        "fact_key": request.fact.key,
        "dry_run": request.dry_run,
    }
