"""Traces: asked for, looked at, stopped."""

from __future__ import annotations

from service.application.job_queue import Idempotency, Queue, draft
from service.application.served_model import Resident
from service.application.validation import check_trace, check_version
from service.jobs.views import Resource
from service.kit.text import words
from service.schemas import TraceRequest


class Traces:
    """Jobs that find where the model keeps a fact."""

    def __init__(self, queue: Queue, resident: Resident) -> None:
        self.queue, self.resident = queue, resident

    def submit(
        self,
        request: TraceRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> Resource:
        if (known := self.queue.known(actor, idempotency)) is not None:
            return known[0]
        model, tokenizer, head = self.resident.at_head()
        check_version(head, request.version)
        check_trace(request, model, tokenizer)
        job = draft("trace", model, request.model_dump(mode="json"), actor) | {
            "subject": words(request.subject)
        }
        return self.queue.submit([job], model, actor, idempotency, max_queued)[0]

    def get(self, trace_id: str) -> Resource:
        return self.queue.one("trace", trace_id)

    def page(self, cursor: str | None = None, limit: int = 50) -> Resource:
        """{"items": newest first, "next": cursor or None}."""
        return self.queue.page("trace", cursor, limit)

    def cancel(self, trace_id: str) -> Resource:
        """Stop a trace that waits or runs; harmless when it has ended."""
        return self.queue.take_back("trace", trace_id, "")
