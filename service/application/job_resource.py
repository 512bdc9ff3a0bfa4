"""The base class of the services of single kinds of jobs: submit, get, list and cancel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.application.job_queue import Idempotency, JobQueue, new_job_row
from service.application.served_model import ServedModel
from service.db.models import Model
from service.jobs.job_kinds import JobKind
from service.jobs.views import ResourceDict
from service.kit.text_encoder import TextEncoder


@dataclass(frozen=True)
class NewJob:
    """A validated request as it is stored."""

    request: dict[str, Any]  #: JSON of the request
    subject: str  #: short description of the job in lists
    artifacts: Mapping[str, bytes] = field(default_factory=dict)  #: data stored beside the row, by name


class JobResourceService:
    """Jobs of one kind. A subclass validates requests in `new_job`; without one every request is accepted as it is."""

    def __init__(self, kind: JobKind, queue: JobQueue, served_model: ServedModel) -> None:
        self.kind, self.queue, self.served_model = kind, queue, served_model

    def new_job(self, request: Any, model: Model, encoder: TextEncoder, head: int) -> NewJob:
        """Validate a request against the served model. Raises InvalidInput before anything is written."""
        return NewJob(request.model_dump(mode="json"), self.kind.name)

    def submit(
        self,
        request: Any,
        actor: str,
        idempotency: Idempotency | None = None,
        limits: CallerLimits = DEFAULT_LIMITS,
    ) -> ResourceDict:
        """Queue a job. A repeated idempotency key with the same body returns the job that it created."""
        if (previous := self.queue.find_by_idempotency_key(actor, idempotency)) is not None:
            return previous[0]
        model, encoder, head = self.served_model.current()
        new_job = self.new_job(request, model, encoder, head)
        row = new_job_row(self.kind.name, model, new_job.request, actor) | {"subject": new_job.subject}
        artifacts = {row["id"]: new_job.artifacts}
        return self.queue.submit([row], model, actor, idempotency, limits, artifacts)[0]

    def get(self, job_id: str) -> ResourceDict:
        """Return a job. Raises NotFound if no job of this kind has the id."""
        return self.queue.get(self.kind.name, job_id)

    def page(self, cursor: str | None = None, limit: int = 50) -> ResourceDict:
        """Return {"items": newest first, "next": cursor or None}."""
        return self.queue.page(self.kind.name, cursor, limit)

    def cancel(self, job_id: str, actor: str = "") -> ResourceDict:
        """Cancel a queued or running job, or revert an applied edit. Has no effect on any other job."""
        return self.queue.cancel_or_revert(self.kind.name, job_id, actor)
