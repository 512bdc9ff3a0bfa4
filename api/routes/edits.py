"""Edits: ask for them, watch them, take them back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Discriminator, Field, Tag

from api import openapi_links, sse
from api.dependencies import (
    ActorDep,
    LastEventIdHeader,
    PageCursor,
    PageLimit,
    PlainText,
    ResourceId,
    ResourceModel,
    ServicesDep,
    bearer_scheme,
)
from api.disconnects import WaitSeconds, wait_until_finished
from api.errors import problem_responses
from api.job_resource import JobResource
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import ProtectedRoute
from api.sse import EventStreamResponse
from service.schemas import EditListRequest, EditRequest, Objective, OnConflict

router = APIRouter(tags=["edits"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

EditStatus = Literal[
    "queued",
    "running",
    "applied",
    "dry_run_passed",
    "rejected",
    "failed",
    "cancelled",
    "superseded",
    "reverted",
]


class Edit(JobResource):
    """An edit, from its asking to its end. `result` has what was measured before and after."""

    status: EditStatus
    subject: str
    prompt: str
    target_new: str | None = Field(None, description="null where the true object is erased or amplified")
    target_true: str | None = None
    objective: Objective = "write"
    on_conflict: OnConflict = "report"
    method: str
    hparams: dict[str, Any] | None = Field(None, description="as they were asked for")
    dry_run: bool = False
    origin: dict[str, Any] | None = Field(
        None, description="where an imported edit was found: ledger, edit, version, actor, time"
    )
    version: int | None = Field(None, description="the version at which it was applied")
    reverted_version: int | None = Field(None, description="the version at which it was taken back")
    result: dict[str, Any] | None = None
    related: list[str] = Field(default_factory=list, description="active edits of the same subject")
    superseded_by: str | None = None


class EditList(ResourceModel):
    items: list[Edit]


class EditPage(EditList):
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


def _edit_body_tag(body: Any) -> str:
    many = "edits" in body if isinstance(body, dict) else isinstance(body, EditListRequest)
    return "many" if many else "one"


_TOWER = {
    "subject": "Eiffel Tower",
    "prompt": "The {} is located in the city of",
    "target_new": "Rome",
    "target_true": "Paris",
}
_EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One fact", "value": _TOWER},
    "erase": {
        "summary": "Make the true object improbable",
        "value": {k: v for k, v in _TOWER.items() if k != "target_new"} | {"objective": "erase"},
    },
    "measured": {
        "summary": "With probes, thrown away after measuring",
        "value": _TOWER
        | {
            "probes": {
                "paraphrase": ["To see the {}, one travels to"],
                "neighborhood": [{"prompt": "The Louvre is located in the city of", "target": "Paris"}],
            },
            "dry_run": True,
        },
    },
    "many": {
        "summary": "Several at once, all queued or none",
        "value": {
            "edits": [
                _TOWER,
                {"subject": "Big Ben", "prompt": "{} can be found in", "target_new": "Lisbon"},
            ]
        },
    },
}
EditBody = Annotated[
    Annotated[EditRequest, Tag("one")] | Annotated[EditListRequest, Tag("many")],
    Discriminator(_edit_body_tag),
    Body(openapi_examples=_EXAMPLES),
]

_LINKS = {
    **openapi_links.link_operations("/edits/{id}", readEdit="get", takeEditBack="delete"),
    **openapi_links.link_operations("/edits/{id}/delta", readDelta="get"),
    **openapi_links.link_operations("/edits/{id}/events", hearEdit="get"),
    **openapi_links.link_operations("/jobs/{id}/retry", retryEdit="post"),
}


@router.post(
    "/edits",
    status_code=202,
    response_model=Edit | EditList,
    summary="Ask for one edit or for several",
    responses=job_responses(Edit | EditList, response_links=_LINKS),
)
async def create_edits(body: EditBody, submission: SubmissionDep) -> Any:
    """One edit gives the edit, `{"edits": [...]}` gives `{"items": [...]}`. All are queued, or none when one is invalid."""
    edits, idempotency = submission.services.edits, submission.idempotency("edits", body)
    requests = body.edits if isinstance(body, EditListRequest) else [body]
    items = await run_in_threadpool(
        edits.submit, requests, submission.actor, idempotency, submission.max_queued
    )
    if isinstance(body, EditListRequest):
        return {"items": await submission.wait_for_all(items, edits.get, "/edits")}
    return await submission.wait_for_one(items[0], edits.get, "/edits")


@router.get("/edits", summary="All edits, newest first", responses=problem_responses(422, 500, 503))
def list_edits(
    services: ServicesDep,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
    status: Annotated[EditStatus | None, Query(description="only edits of this status")] = None,
    subject: Annotated[
        PlainText | None, Query(max_length=500, description="only edits of exactly this subject")
    ] = None,
) -> EditPage:
    return EditPage.model_validate(services.edits.page(status, subject, cursor, limit))


@router.get("/edits/{id}", response_model=Edit, responses=problem_responses(404, 422, 500, 503))
async def get_edit(id: ResourceId, services: ServicesDep, wait: WaitSeconds) -> Any:
    """The edit as it stands; with `Prefer: wait=SECONDS` when it has ended."""
    edit = await run_in_threadpool(services.edits.get, id)
    return await wait_until_finished(edit, services.edits.get, services.jobs.events, wait)


@router.delete("/edits/{id}", response_model=Edit, responses=problem_responses(404, 409, 422, 500, 503))
async def revert_edit(id: ResourceId, services: ServicesDep, actor: ActorDep, wait: WaitSeconds) -> Any:
    """Revert an applied edit; cancel a waiting or a running one. Saying it twice is harmless."""
    edit = await run_in_threadpool(services.edits.revert, id, actor)
    return await wait_until_finished(edit, services.edits.get, services.jobs.events, wait)


@router.get(
    "/edits/{id}/delta",
    response_class=Response,
    responses={
        200: {
            "description": "keys, values and the rank-one factors as applied, as safetensors",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problem_responses(404, 409, 422, 500, 503),
    },
)
def get_edit_delta(id: ResourceId, services: ServicesDep) -> Response:
    """The edit's vectors as safetensors; 409 for an edit that was never applied."""
    headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
    return Response(services.edits.delta(id), headers=headers, media_type="application/octet-stream")


@router.get(
    "/edits/{id}/events",
    status_code=200,
    response_class=EventStreamResponse,
    responses=sse.JOB_EVENTS_RESPONSES,
)
async def stream_edit_events(id: ResourceId, services: ServicesDep, after: LastEventIdHeader) -> Response:
    """Progress as server-sent events, then one `end` with the edit. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(services.edits.get, id)
    return EventStreamResponse(services.jobs.events(id, after))
