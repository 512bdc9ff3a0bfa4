"""Names of versions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response
from pydantic import Field

from api.dependencies import (
    ActorDep,
    PageCursor,
    PageLimit,
    ResourceModel,
    ServicesDep,
    Timestamp,
    bearer_scheme,
)
from api.errors import problem_responses
from api.protected_route import ProtectedRoute, requires
from service.application.api_keys import Scope
from service.kit.versions import VERSION_NAME_PATTERN
from service.schemas import VersionNameRequest

router = APIRouter(tags=["versions"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

Name = Annotated[
    str,
    Path(
        pattern=VERSION_NAME_PATTERN,
        description="begins with a letter, and has letters, digits, `.`, `_` and `-`",
        examples=["before-release"],
    ),
]


class NamedVersion(ResourceModel):
    """A name of a version. It stays that version, whatever is applied or reverted later."""

    name: str
    version: int
    model: str = Field(description="the model name that means this version below /v1")
    actor: str = Field(description="the API key that gave the name")
    created: Timestamp


class NamedVersionPage(ResourceModel):
    items: list[NamedVersion]
    next: str | None = Field(None, description="cursor of the next page; null on the last page")


@router.get(
    "/versions",
    response_model=NamedVersionPage,
    summary="List the names of versions",
    responses=problem_responses(422, 500, 503),
)
def list_named_versions(services: ServicesDep, cursor: PageCursor = None, limit: PageLimit = 50) -> Any:
    """List the names that were given to versions, by name."""
    return services.version_names.page(cursor, limit)


@router.get(
    "/versions/{name}",
    response_model=NamedVersion,
    summary="Get a name of a version",
    responses=problem_responses(404, 422, 500, 503),
)
def get_named_version(name: Name, services: ServicesDep) -> Any:
    return services.version_names.get(name)


@router.put(
    "/versions/{name}",
    response_model=NamedVersion,
    summary="Give a name to a version",
    responses={
        201: {"model": NamedVersion, "description": "The name is new."},
        **problem_responses(400, 409, 413, 415, 422, 500, 503),
    },
)
@requires(Scope.EDIT)
def name_version(
    name: Name,
    body: Annotated[
        VersionNameRequest,
        Body(openapi_examples={"head": {"summary": "The newest version", "value": {"version": "head"}}}),
    ],
    services: ServicesDep,
    actor: ActorDep,
    response: Response,
) -> Any:
    """Give a name to a version. Status 409 means that another version has the name: a name does not move, and has to be
    deleted first. Repeating the request has no further effect."""
    named, is_new = services.version_names.give(name, body.version, actor)
    response.status_code = 201 if is_new else 200
    return named


@router.delete(
    "/versions/{name}",
    response_model=NamedVersion,
    summary="Delete a name of a version",
    responses=problem_responses(404, 422, 500, 503),
)
@requires(Scope.EDIT)
def delete_version_name(name: Name, services: ServicesDep, actor: ActorDep) -> Any:
    """Delete a name. The version stays, with its number."""
    return services.version_names.delete(name, actor)
