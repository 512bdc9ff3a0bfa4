"""Trainings: validation of requests, and their records as an artifact."""

from __future__ import annotations

from service.application.evaluations import job_of_records
from service.application.job_resource import JobResourceService, NewJob
from service.application.validation import validate_training
from service.db.models import Model
from service.kit.text_encoder import TextEncoder
from service.schemas import TrainingRequest


class TrainingService(JobResourceService):
    """Jobs that train the learned part of a method. The records are stored beside the row while the job is open."""

    def new_job(self, request: TrainingRequest, model: Model, encoder: TextEncoder, head: int) -> NewJob:
        validate_training(request, model)
        return job_of_records(request)
