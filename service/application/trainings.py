"""Trainings: validation of requests, and their records as an artifact."""

from __future__ import annotations

from service.application.evaluations import encode_list
from service.application.job_resource import JobResourceService, NewJob
from service.application.validation import validate_training
from service.db.models import Model
from service.jobs import artifacts
from service.kit.text_encoder import TextEncoder
from service.schemas import TrainingRequest


class TrainingService(JobResourceService):
    """Jobs that train the learned part of a method. The records are stored beside the row while the job is open."""

    def new_job(self, request: TrainingRequest, model: Model, encoder: TextEncoder, head: int) -> NewJob:
        validate_training(request, model)
        count = None if request.records is None else len(request.records)
        return NewJob(
            request.model_dump(mode="json", exclude={"records"}) | {"records": count},
            f"{request.method} on {request.dataset or f'{count} records'}",
            {} if request.records is None else {artifacts.RECORDS: encode_list(request.records)},
        )
