"""Evaluations: asked for, looked at, stopped."""

from __future__ import annotations

import json

from service.application.job_queue import Idempotency, JobQueue, new_job_row
from service.application.served_model import ServedModel
from service.application.validation import validate_evaluation
from service.jobs import artifacts
from service.jobs.views import ResourceDict
from service.schemas import EvaluationRequest


class EvaluationService:
    """Jobs that measure how good edits are."""

    def __init__(self, queue: JobQueue, served_model: ServedModel) -> None:
        self.queue, self.served_model = queue, served_model

    def submit(
        self,
        request: EvaluationRequest,
        actor: str,
        idempotency: Idempotency | None = None,
        max_queued: int | None = None,
    ) -> ResourceDict:
        """Queue an evaluation. Its records are kept beside its row, and only while it is open."""
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous[0]
        model, tokenizer, _ = self.served_model.current()
        validate_evaluation(request, model, tokenizer)
        count = None if request.records is None else len(request.records)
        stored_request = request.model_dump(mode="json", exclude={"records"}) | {"records": count}
        job = new_job_row("evaluation", model, stored_request, actor) | {
            "subject": f"{request.method} on {request.dataset or f'{count} records'}"
        }
        initial_artifacts = (
            {} if request.records is None else {artifacts.RECORDS: json.dumps(request.records).encode()}
        )
        return self.queue.submit(
            [job], model, actor, idempotency, max_queued, {job["id"]: initial_artifacts}
        )[0]

    def get(self, evaluation_id: str) -> ResourceDict:
        return self.queue.get("evaluation", evaluation_id)

    def page(self, cursor: str | None = None, limit: int = 50) -> ResourceDict:
        """{"items": newest first, without their results, "next": cursor or None}."""
        return self.queue.page("evaluation", cursor, limit)

    def cancel(self, evaluation_id: str) -> ResourceDict:
        """Stop an evaluation that waits or runs; harmless when it has ended."""
        return self.queue.cancel_or_revert("evaluation", evaluation_id, "")
