"""Health, for whoever restarts processes. Open without a key: a probe carries none, and no content is shown."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import Resource, Work
from api.errors import problems
from api.routes.models import WorkerState

router = APIRouter(tags=["health"])


class Alive(Resource):
    status: Literal["alive"] = "alive"


class Ready(Resource):
    ready: bool
    head: int
    workers: list[WorkerState]
    waiting: dict[str, int] = Field(description="calls and jobs that wait, by kind")


@router.get("/healthz", responses=problems(422, 500))
async def alive() -> Alive:
    """The process answers. Nothing else is looked at."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses=problems(422, 500, 503))
def ready(work: Work) -> Any:
    """Database and queue answer, a worker that speaks stands at head, and somebody does what waits; else 503 with `reasons`."""
    return work.models.ready()
