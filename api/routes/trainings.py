"""Trainings: the learned part of an editing method, trained on records."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from api.job_resource import JobResource, JobRoutes
from api.protected_route import RequestBody
from service.jobs.job_kinds import JOB_KINDS


class Training(JobResource):
    """A training. When it is done, edits of its method use what it trained."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any] = Field(description="the request; `records` is the number of records")
    result: dict[str, Any] | None = Field(
        None,
        description="the digest of the classifier, its thresholds, and its figures on subjects that were held out",
    )


_EXAMPLES: dict[str, Any] = {
    "facts": {
        "summary": "Train the scope classifier of SERAC on the fact table of the model",
        "value": {"method": "serac", "dataset": "facts", "limit": 1000},
    },
}

_routes = JobRoutes(JOB_KINDS["training"], Training, examples=_EXAMPLES)
_routes.add_create(
    "Train the scope classifier of SERAC, which recognises the prompts that an edit is about, on records with paraphrases. "
    "Half of their subjects are held out, to choose its threshold and to measure it. Edits of the method serac use the "
    "newest classifier of their layer. The ledger is not changed, and neither are edits that were made with an older one.",
    RequestBody.RECORDS,
)
_routes.add_list("The newest training is the first.")
_routes.add_get("Return the training. `Prefer: wait=SECONDS` waits until it has ended.")
_routes.add_cancel()
_routes.add_events()
router = _routes.router
