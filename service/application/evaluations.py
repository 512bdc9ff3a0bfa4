"""Evaluations: asked for, looked at, stopped."""

from __future__ import annotations

import json

from service.application.job_queue import Idempotency, Queue, draft
from service.application.served_model import Resident
from service.application.validation import check_evaluation
from service.jobs import artifacts
from service.jobs.views import Resource
from service.schemas import EvaluationRequest


class Evaluations:
    """Jobs that measure how good edits are."""

    def __init__(self, queue: Queue, resident: Resident) -> None:
        self.queue, self.resident = queue, resident

    def submit(
        self,
        request: EvaluationRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> Resource:
        """Queue an evaluation. Its records are kept beside its row, and only while it is open."""
        if (known := self.queue.known(actor, idempotency)) is not None:
            return known[0]
        model, tokenizer, _ = self.resident.at_head()
        check_evaluation(request, model, tokenizer)
        count = None if request.records is None else len(request.records)
        asked = request.model_dump(mode="json", exclude={"records"}) | {"records": count}
        job = draft("evaluation", model, asked, actor) | {
            "subject": f"{request.method} on {request.dataset or f'{count} records'}"
        }
        kept = {} if request.records is None else {artifacts.RECORDS: json.dumps(request.records).encode()}
        return self.queue.submit([job], model, actor, idempotency, max_queued, {job["id"]: kept})[0]

    def get(self, evaluation_id: str) -> Resource:
        return self.queue.one("evaluation", evaluation_id)

    def page(self, cursor: str | None = None, limit: int = 50) -> Resource:
        """{"items": newest first, without their results, "next": cursor or None}."""
        return self.queue.page("evaluation", cursor, limit)

    def cancel(self, evaluation_id: str) -> Resource:
        """Stop an evaluation that waits or runs; harmless when it has ended."""
        return self.queue.take_back("evaluation", evaluation_id, "")
