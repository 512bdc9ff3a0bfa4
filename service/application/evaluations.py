"""Evaluations: validation of requests, and their records as an artifact."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from service.application.job_resource import JobResourceService, NewJob
from service.application.validation import validate_evaluation
from service.db.models import Model
from service.jobs import artifacts
from service.schemas import EvaluationRequest


class EvaluationService(JobResourceService):
    """Jobs that measure the quality of edits. The records are stored beside the row while the job is open."""

    def new_job(self, request: EvaluationRequest, model: Model, tokenizer: Tokenizer, head: int) -> NewJob:
        validate_evaluation(request, model, tokenizer)
        count = None if request.records is None else len(request.records)
        return NewJob(
            request.model_dump(mode="json", exclude={"records"}) | {"records": count},
            f"{request.method} on {request.dataset or f'{count} records'}",
            {} if request.records is None else {artifacts.RECORDS: json.dumps(request.records).encode()},
        )
