"""Traces: asked for, looked at, stopped."""

from __future__ import annotations

from service.application.job_queue import Idempotency, JobQueue, new_job_row
from service.application.served_model import ServedModel
from service.application.validation import validate_trace
from service.jobs.views import ResourceDict
from service.kit.text import normalize_whitespace
from service.kit.versions import resolve_version
from service.schemas import TraceRequest


class TraceService:
    """Jobs that find where the model keeps a fact."""

    def __init__(self, queue: JobQueue, served_model: ServedModel) -> None:
        self.queue, self.served_model = queue, served_model

    def submit(
        self,
        request: TraceRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> ResourceDict:
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous[0]
        model, tokenizer, head = self.served_model.current()
        resolve_version(request.version, head)
        validate_trace(request, model, tokenizer)
        job = new_job_row("trace", model, request.model_dump(mode="json"), actor) | {
            "subject": normalize_whitespace(request.subject)
        }
        return self.queue.submit([job], model, actor, idempotency, max_queued)[0]

    def get(self, trace_id: str) -> ResourceDict:
        return self.queue.get("trace", trace_id)

    def page(self, cursor: str | None = None, limit: int = 50) -> ResourceDict:
        """{"items": newest first, "next": cursor or None}."""
        return self.queue.page("trace", cursor, limit)

    def cancel(self, trace_id: str) -> ResourceDict:
        """Stop a trace that waits or runs; harmless when it has ended."""
        return self.queue.cancel_or_revert("trace", trace_id, "")
