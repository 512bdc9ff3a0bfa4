"""Health, for whoever restarts processes. Open without a key: a probe carries none, and no content is shown."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter

from api.dependencies import Resource, Work
from api.errors import problems

router = APIRouter(tags=["health"])


class Alive(Resource):
    status: Literal["alive"] = "alive"


class Ready(Resource):
    ready: bool


@router.get("/healthz", responses=problems(422, 500))
async def alive() -> Alive:
    """The process answers. Nothing else is looked at."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses=problems(422, 500, 503))
def ready(work: Work) -> Any:
    """Database and queue answer and a worker stands at head; 503 with `reasons` otherwise."""
    return work.ready()
