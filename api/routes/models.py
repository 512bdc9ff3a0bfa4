"""The served model and its workers."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import ResourceModel, ServicesDep, Timestamp, bearer_scheme
from api.errors import problem_responses
from api.protected_route import ProtectedRoute

router = APIRouter(tags=["models"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class PreparationState(ResourceModel):
    """How far a worker is with what edits need: the corpus and the statistics of keys."""

    phase: str = Field(description="what is computed now; `failed` after an error")
    done: int
    total: int
    seconds_left: float | None = Field(None, description="an estimate; null while there is none")
    error: str | None = Field(None, description="why it failed; the next edit tries again")


class WorkerState(ResourceModel):
    """A worker: its version, its last heartbeat, and why it is in quarantine if it is."""

    id: str
    state: Literal["serving", "withdrawn"]
    reason: str | None = Field(None, description="why the worker is in quarantine")
    roles: list[str] = Field(description="roles of the worker; all roles if empty")
    version: int
    lag: int = Field(description="number of versions behind the newest")
    digest: str | None = Field(None, description="digest of its weights at that version")
    heartbeat: Timestamp
    age: float = Field(description="seconds since the heartbeat")
    host: str
    pid: int
    preparing: PreparationState | None = Field(
        None, description="progress of what edits need and wait for; null when it is ready"
    )


class JobCounts(ResourceModel):
    """Numbers of jobs by state."""

    queued: int
    running: int
    exhausted: int = Field(
        description="failed jobs whose attempts are used up: see `GET /jobs?exhausted=true`"
    )


class LayerCapacity(ResourceModel):
    """The remaining capacity of each edited layer: the mean share of a random key that active edits do not occupy."""

    version: int = Field(description="the version at which the capacity was measured")
    layers: dict[str, float]


class MethodInfo(ResourceModel):
    """An editing method."""

    name: str
    title: str
    paper: str
    closed_form: bool = Field(
        description="whether it searches for a value and writes it at the layers of the recipe for rome; the other methods have "
        "layers of their own"
    )
    parameters: list[str] = Field(description="the names that `hparams` may have")


class SuiteInfo(ResourceModel):
    """A suite of an evaluation."""

    name: str
    title: str
    measures: dict[str, str] = Field(description="what each measure of the suite is")
    needs_chat: bool = Field(description="whether it needs a model with a chat template")


class ModelResource(ResourceModel):
    """The served model: architecture, editable layers, methods, recipe, newest version and workers."""

    name: str
    fingerprint: str = Field(description="SHA-256 of the base weights")
    head: int = Field(description="the newest version")
    active_edits: int
    chat: bool = Field(description="whether the model has a chat template, which `messages` need")
    methods: list[MethodInfo] = Field(description="the editing methods that `method` of an edit may name")
    suites: list[SuiteInfo] = Field(description="the suites that `suites` of an evaluation may name")
    jobs: JobCounts
    capacity: LayerCapacity | None = Field(None, description="null until a worker has measured it")
    workers: list[WorkerState] = Field(description="live workers, and for one day those in quarantine")


class ModelResourceList(ResourceModel):
    items: list[ModelResource]


@router.get(
    "/models",
    summary="List models",
    response_model=ModelResourceList,
    responses=problem_responses(422, 500, 503),
)
def list_models(services: ServicesDep) -> Any:
    """Return the served model. The list has one item."""
    return {"items": [services.models.describe()]}
