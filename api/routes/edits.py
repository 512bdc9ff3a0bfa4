"""Edits: ask for them, watch them, take them back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Discriminator, Field, Tag

from api import openapi_links, sse
from api.dependencies import (
    Actor,
    Cursor,
    Id,
    LastEventId,
    Limit,
    PlainText,
    Resource,
    Work,
    bearer,
)
from api.disconnects import Wait, until_ended
from api.errors import problems
from api.job_resource import Course
from api.job_submission import Submitted, answers
from api.protected_route import Door
from api.sse import EventStream
from service.schemas import EditRequest, ManyEdits, Objective, OnConflict

router = APIRouter(tags=["edits"], route_class=Door, dependencies=[bearer])

EditStatus = Literal[
    "queued", "running", "applied", "evaluated", "rejected", "failed", "cancelled", "superseded", "reverted"
]


class Edit(Course):
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


class Edits(Resource):
    items: list[Edit]


class EditPage(Edits):
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


def _one_or_many(body: Any) -> str:
    many = "edits" in body if isinstance(body, dict) else isinstance(body, ManyEdits)
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
    Annotated[EditRequest, Tag("one")] | Annotated[ManyEdits, Tag("many")],
    Discriminator(_one_or_many),
    Body(openapi_examples=_EXAMPLES),
]

_LINKS = {
    **openapi_links.to("/edits/{id}", readEdit="get", takeEditBack="delete"),
    **openapi_links.to("/edits/{id}/delta", readDelta="get"),
    **openapi_links.to("/edits/{id}/events", hearEdit="get"),
    **openapi_links.to("/jobs/{id}/retry", retryEdit="post"),
}


@router.post(
    "/edits",
    status_code=202,
    response_model=Edit | Edits,
    summary="Ask for one edit or for several",
    responses=answers(Edit | Edits, then=_LINKS),
)
async def submit(asked: EditBody, submitted: Submitted) -> Any:
    """One edit gives the edit, `{"edits": [...]}` gives `{"items": [...]}`. All are queued, or none when one is invalid."""
    edits, known = submitted.work.edits, submitted.once("edits", asked)
    requests = asked.edits if isinstance(asked, ManyEdits) else [asked]
    items = await run_in_threadpool(edits.submit, requests, submitted.actor, known, submitted.most)
    if isinstance(asked, ManyEdits):
        return {"items": await submitted.all(items, edits.get, "/edits")}
    return await submitted.one(items[0], edits.get, "/edits")


@router.get("/edits", summary="All edits, newest first", responses=problems(422, 500, 503))
def listing(
    work: Work,
    cursor: Cursor = None,
    limit: Limit = 50,
    status: Annotated[EditStatus | None, Query(description="only edits of this status")] = None,
    subject: Annotated[
        PlainText | None, Query(max_length=500, description="only edits of exactly this subject")
    ] = None,
) -> EditPage:
    return EditPage.model_validate(work.edits.page(status, subject, cursor, limit))


@router.get("/edits/{id}", response_model=Edit, responses=problems(404, 422, 500, 503))
async def one(id: Id, work: Work, wait: Wait) -> Any:
    """The edit as it stands; with `Prefer: wait=SECONDS` when it has ended."""
    edit = await run_in_threadpool(work.edits.get, id)
    return await until_ended(edit, work.edits.get, work.jobs.events, wait)


@router.delete("/edits/{id}", response_model=Edit, responses=problems(404, 409, 422, 500, 503))
async def revert(id: Id, work: Work, actor: Actor, wait: Wait) -> Any:
    """Revert an applied edit; cancel a waiting or a running one. Saying it twice is harmless."""
    edit = await run_in_threadpool(work.edits.revert, id, actor)
    return await until_ended(edit, work.edits.get, work.jobs.events, wait)


@router.get(
    "/edits/{id}/delta",
    response_class=Response,
    responses={
        200: {
            "description": "keys, values and the rank-one factors as applied, as safetensors",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems(404, 409, 422, 500, 503),
    },
)
def delta(id: Id, work: Work) -> Response:
    """The edit's vectors as safetensors; 409 for an edit that was never applied."""
    headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
    return Response(work.edits.delta(id), headers=headers, media_type="application/octet-stream")


@router.get(
    "/edits/{id}/events",
    status_code=200,
    response_class=EventStream,
    responses=sse.FOLLOWED,
)
async def news(id: Id, work: Work, after: LastEventId) -> Response:
    """Progress as server-sent events, then one `end` with the edit. Resumes from `Last-Event-ID`."""
    await run_in_threadpool(work.edits.get, id)
    return EventStream(work.jobs.events(id, after))
