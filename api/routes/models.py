"""The resident model."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import ResourceModel, ServicesDep, Timestamp, bearer_scheme
from api.errors import problem_responses
from api.protected_route import ProtectedRoute

router = APIRouter(tags=["models"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class WorkerState(ResourceModel):
    """A worker: where it stands, when it was last heard of, and why it serves no more if it took itself out."""

    id: str
    state: Literal["serving", "withdrawn"]
    reason: str | None = Field(None, description="why it took itself out")
    roles: list[str] = Field(description="what it does; everything when empty")
    version: int
    lag: int = Field(description="versions behind the head")
    digest: str | None = Field(None, description="of its weights at that version")
    heartbeat: Timestamp
    age: float = Field(description="seconds since the heartbeat")
    host: str
    pid: int


class JobCounts(ResourceModel):
    queued: int
    running: int
    exhausted: int = Field(description="given up after too many attempts: see `GET /jobs?exhausted=true`")


class LayerCapacity(ResourceModel):
    """How much of each edited layer is left: of a key drawn from the statistics, the share that active edits have not spoken for."""

    version: int = Field(description="the version that this was last measured at")
    layers: dict[str, float]


class MethodInfo(ResourceModel):
    """An editing method."""

    name: str
    title: str
    paper: str
    closed_form: bool = Field(description="whether it writes associations; otherwise it trains whole weights")
    parameters: list[str] = Field(description="the names that `hparams` may have")


class ModelResource(ResourceModel):
    """The model, its architecture, editable layers, recipe, head version and workers."""

    name: str
    fingerprint: str = Field(description="of the base weights")
    head: int = Field(description="the newest version")
    active_edits: int
    methods: list[MethodInfo] = Field(description="the editing methods that `method` of an edit may name")
    jobs: JobCounts
    capacity: LayerCapacity | None = Field(None, description="null until a worker has reached a version")
    workers: list[WorkerState] = Field(
        description="those that live, and for a day those that took themselves out"
    )


class ModelResourceList(ResourceModel):
    items: list[ModelResource]


@router.get("/models", response_model=ModelResourceList, responses=problem_responses(422, 500, 503))
def list_models(services: ServicesDep) -> Any:
    """What is resident: architecture, editable layers, recipe, head version, active edits and workers."""
    return {"items": [services.models.describe()]}
