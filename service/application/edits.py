"""Edits: submit one or several, filter the list, revert one or several, and read the factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.conversations import ConversationRenderer
from service.application.edit_filters import EditFilters
from service.application.edit_table import EditTableReader
from service.application.job_queue import Idempotency, get_job, new_job_row
from service.application.job_resource import JobResourceService
from service.application.validation import error_path, resolve_methods, validate_edit
from service.db.models import Model, StoredFactors
from service.errors import Conflict
from service.jobs.views import ResourceDict
from service.kit.pagination import MAX_PAGE_SIZE
from service.kit.search_text import search_text
from service.kit.text import normalize_whitespace
from service.schemas import EditRequest, EditTableRequest, RevertRequest

ALL_EDITS = EditFilters()


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

    def page(
        self, cursor: str | None = None, limit: int = 50, filters: EditFilters = ALL_EDITS
    ) -> ResourceDict:
        """Return {"items": newest first, "next": cursor or None}."""
        return self.queue.page(self.kind.name, cursor, limit, filters.conditions())

    def iter_all(self, filters: EditFilters = ALL_EDITS) -> Iterator[ResourceDict]:
        """Return an iterator over all edits, newest first. The first page is read at once, so that its errors are
        raised here; one page is in memory at a time."""
        return self._iter_pages(self.page(None, MAX_PAGE_SIZE, filters), filters)

    def _iter_pages(self, page: ResourceDict, filters: EditFilters) -> Iterator[ResourceDict]:
        while True:
            yield from page["items"]
            if page["next"] is None:
                return
            page = self.page(page["next"], MAX_PAGE_SIZE, filters)

    def revert_many(self, request: RevertRequest, actor: str) -> ResourceDict:
        """Revert or cancel several edits, all or none; see `JobQueue.revert_edits`."""
        return self.queue.revert_edits(request, actor)

    def preview(self, request: EditTableRequest) -> ResourceDict:
        """Return the lines of a CSV text as requests, each checked; nothing is queued."""
        model, encoder, _ = self.served_model.current()
        with self.queue.database.read_session() as session:
            return EditTableReader(session, model, encoder).read(request.csv, request.columns)

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
    row = new_job_row("edit", model, request.model_dump(mode="json"), actor)
    return row | {
        "subject": normalize_whitespace(request.subject),
        "fact_key": request.fact.key,
        "dry_run": request.dry_run,
        "batch": request.batch,
        "search_text": search_text(row["request"]),
    }
