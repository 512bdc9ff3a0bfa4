"""Liveness and readiness probes. They need no API key, because probes have none, and return no content of the model."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import ResourceModel, ServicesDep
from api.errors import problem_responses

router = APIRouter(tags=["health"])


class Liveness(ResourceModel):
    """The process is alive."""

    status: Literal["alive"] = "alive"


class Readiness(ResourceModel):
    """The service is ready."""

    ready: bool
    head: int
    workers: int = Field(description="live workers; GET /models describes them")
    waiting: dict[str, int] = Field(description="queued calls and jobs, by kind")


@router.get("/healthz", summary="Liveness", responses=problem_responses(422, 500))
async def check_liveness() -> Liveness:
    """Return 200 while the process responds. No dependency is checked."""
    return Liveness()


@router.get(
    "/readyz", summary="Readiness", response_model=Readiness, responses=problem_responses(422, 500, 503)
)
def check_readiness(services: ServicesDep) -> Any:
    """Return 200 if the database and the broker respond, a worker serves generation at the newest version, and every
    queued kind of job has a worker. Otherwise 503; `reasons` lists what is missing."""
    return services.models.check_ready()
