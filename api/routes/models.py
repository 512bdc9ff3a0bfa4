"""The resident model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from api.dependencies import Resource, Work, bearer
from api.door import Door
from api.errors import problems

router = APIRouter(tags=["models"], route_class=Door, dependencies=[bearer])


class Model(Resource):
    """The model, its architecture, editable layers, recipe, head version and workers."""

    name: str
    fingerprint: str = Field(description="of the base weights")
    head: int = Field(description="the newest version")


class Models(Resource):
    items: list[Model]


@router.get("/models", response_model=Models, responses=problems(401, 422, 500, 503))
def listing(work: Work) -> Any:
    """What is resident: architecture, editable layers, recipe, head version, active edits and workers."""
    return {"items": work.models()}
