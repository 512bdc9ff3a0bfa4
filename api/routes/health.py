"""Health, for whoever restarts processes. Open without a key: a probe carries none, and no content is shown."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import ResourceModel, ServicesDep
from api.errors import problem_responses
from api.routes.models import WorkerState

router = APIRouter(tags=["health"])


class Liveness(ResourceModel):
    status: Literal["alive"] = "alive"


class Readiness(ResourceModel):
    ready: bool
    head: int
    workers: list[WorkerState]
    waiting: dict[str, int] = Field(description="calls and jobs that wait, by kind")


@router.get("/healthz", responses=problem_responses(422, 500))
async def check_liveness() -> Liveness:
    """The process answers. Nothing else is looked at."""
    return Liveness()


@router.get("/readyz", response_model=Readiness, responses=problem_responses(422, 500, 503))
def check_readiness(services: ServicesDep) -> Any:
    """Database and queue answer, a worker that speaks stands at head, and somebody does what waits; else 503 with `reasons`."""
    return services.models.check_ready()
