"""Evaluations: validation of requests, and their records as an artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from service.application.conversations import ConversationRenderer
from service.application.job_resource import JobResourceService, NewJob
from service.application.validation import validate_evaluation
from service.datasets.parsing import errors_name_record, record_label
from service.datasets.user_records import has_conversation, validate_user_record
from service.db.models import Model
from service.jobs import artifacts
from service.kit.text_encoder import TextEncoder
from service.schemas import EvaluationRequest, TrainingRequest


class EvaluationService(JobResourceService):
    """Jobs that measure the quality of edits. The records are stored beside the row while the job is open."""

    def new_job(self, request: EvaluationRequest, model: Model, encoder: TextEncoder, head: int) -> NewJob:
        request = request.model_copy(update={"records": self._render(request.records)})
        validate_evaluation(request, model, encoder)
        return job_of_records(request)

    def _render(self, rows: list[Any] | None) -> list[Any] | None:
        """Return the records with the conversations of users' records rendered."""
        if rows is None or not any(map(has_conversation, rows)):
            return rows
        renderer = ConversationRenderer(self.served_model)
        return [
            _render_row(renderer, row, place) if has_conversation(row) else row
            for place, row in enumerate(rows, 1)
        ]


def _render_row(renderer: ConversationRenderer, row: Any, place: int) -> dict[str, Any]:
    record = validate_user_record(row, place)
    with errors_name_record(record_label(row, place)):
        return renderer.render_record(record).model_dump(mode="json")


def job_of_records(request: EvaluationRequest | TrainingRequest) -> NewJob:
    """Return the job of a request with records, which are an artifact. Its row has their number."""
    count = None if request.records is None else len(request.records)
    return NewJob(
        request.model_dump(mode="json", exclude={"records"}) | {"records": count},
        f"{request.method} on {request.dataset or f'{count} records'}",
        {} if request.records is None else {artifacts.RECORDS: _encode_list(request.records)},
    )


def _encode_list(items: Sequence[Any]) -> bytes:
    """Return a list as JSON. Each item is encoded alone: the encoder of the standard library holds the interpreter's
    lock for a whole text."""
    return b"[" + b", ".join(json.dumps(item).encode() for item in items) + b"]"
