"""The registry of the kinds of work: names, urgency, worker roles, HTTP paths, request models, artifacts, serializers.

Broker queues, worker roles, resource views, artifacts, API scopes and the command line read this table. A new kind of
job needs a row here, a request model in `service/schemas.py`, a serializer in `service/jobs/views.py` and a handler in
`workers/job_handlers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class CallKind:
    """A kind of request that the broker carries whole. It has no row in the database."""

    name: str
    role: str  #: of the workers that answer it
    urgency: int  #: 0 is the most urgent; unique among all kinds of work


@dataclass(frozen=True)
class JobKind:
    """A kind of job. Each job is a row of the table `jobs`."""

    name: str
    role: str  #: of the workers that run it
    urgency: (
        int  #: 0 is the most urgent; a more urgent job preempts a running one of its caller between two steps
    )
    id_prefix: str  #: of the ids of its jobs
    path: str  #: of the collection of its jobs in the HTTP API
    request_model: str  #: "module:class" of the validated request
    serializer: str  #: "module:function" from (session, jobs of this kind and one model) to resources
    list_serializer: str = ""  #: the same for lists, when these show less
    #: "module:class" that validates and submits requests
    service: str = "service.application.job_resource:JobResourceService"
    time_weight: float = 2.0  #: its share of the time beside jobs of other callers is in proportion to this
    submit_scope: str = "edit"  #: API key scope to submit one
    cancel_scope: str = "edit"  #: API key scope to cancel one
    has_artifacts: bool = False  #: whether its jobs store artifacts while they are open, or after they failed
    max_kept: int = 0  #: number of its newest finished jobs whose artifacts are kept
    result_artifact: str = ""  #: the only artifact that a finished job keeps; "": all of them

    def request_class(self) -> Any:
        """Return the pydantic model of its requests."""
        return resolve_name(self.request_model)

    def service_class(self) -> Any:
        """Return the subclass of JobResourceService that validates and submits its requests."""
        return resolve_name(self.service)

    def serialize(self, *args: Any) -> Any:
        """Return the resources of jobs in full."""
        return resolve_name(self.serializer)(*args)

    def serialize_list(self, *args: Any) -> Any:
        """Return the resources of jobs as a list shows them."""
        return resolve_name(self.list_serializer or self.serializer)(*args)


_CALLS = (
    CallKind("generate", role="generate", urgency=0),
    CallKind("compare", role="generate", urgency=1),
)
_JOBS = (
    JobKind(
        "edit",
        role="edit",
        urgency=2,
        id_prefix="edit",
        path="/edits",
        request_model="service.schemas:EditRequest",
        service="service.application.edits:EditService",
        serializer="service.jobs.views:serialize_edits",
        has_artifacts=True,
    ),
    JobKind(
        "trace",
        role="trace",
        urgency=3,
        id_prefix="trace",
        path="/trace",
        request_model="service.schemas:TraceRequest",
        service="service.application.traces:TraceService",
        serializer="service.jobs.views:serialize_traces",
        submit_scope="read",
    ),
    JobKind(
        "export",
        role="edit",
        urgency=4,
        id_prefix="export",
        path="/exports",
        request_model="service.schemas:ExportRequest",
        service="service.application.exports:ExportService",
        serializer="service.jobs.views:serialize_exports",
        time_weight=1.0,
        submit_scope="read",
        has_artifacts=True,
        max_kept=4,
    ),
    JobKind(
        "evaluation",
        role="evaluate",
        urgency=5,
        id_prefix="evaluation",
        path="/evaluations",
        request_model="service.schemas:EvaluationRequest",
        service="service.application.evaluations:EvaluationService",
        serializer="service.jobs.views:serialize_evaluations",
        time_weight=1.0,
        list_serializer="service.jobs.views:summarize_evaluations",
        has_artifacts=True,
    ),
    JobKind(
        "training",
        role="evaluate",
        urgency=6,
        id_prefix="training",
        path="/trainings",
        request_model="service.schemas:TrainingRequest",
        service="service.application.trainings:TrainingService",
        serializer="service.jobs.views:serialize_trainings",
        time_weight=1.0,
        has_artifacts=True,
        max_kept=16,
        result_artifact="classifier",
    ),
)

#: the kinds of calls and of jobs by name, most urgent first
CALL_KINDS = {kind.name: kind for kind in _CALLS}
JOB_KINDS = {kind.name: kind for kind in _JOBS}
_ALL: tuple[CallKind | JobKind, ...] = tuple(sorted((*_CALLS, *_JOBS), key=lambda kind: kind.urgency))
#: the names of all kinds of work, most urgent first
WORK_KINDS = tuple(kind.name for kind in _ALL)
#: worker role -> names of the kinds of work that it takes, most urgent first
ROLES = {
    role: tuple(kind.name for kind in _ALL if kind.role == role)
    for role in dict.fromkeys(k.role for k in _ALL)
}
