"""Edits: create, list, read, download and revert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Discriminator, Field, Tag

from api import openapi_links
from api.content_negotiation import CSV
from api.dependencies import (
    ActorDep,
    PageCursor,
    PageLimit,
    PlainText,
    ResourceId,
    ResourceModel,
    ServicesDep,
)
from api.errors import encode_json, problem_responses
from api.job_resource import EditStatus, JobResource, JobRoutes
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import BINARY_MEDIA_TYPE, requires, run_on_body
from api.quotas import CallQuotaDep
from service.application.api_keys import Scope
from service.application.edit_filters import EditFilters
from service.application.edit_table import csv_lines
from service.jobs.job_kinds import JOB_KINDS
from service.kit.search_text import MAX_QUERY
from service.kit.separator import Separator
from service.schemas import (
    ChatMessage,
    EditListRequest,
    EditRequest,
    EditTableRequest,
    Objective,
    OnConflict,
    RevertRequest,
)

CHUNK = 64_000  # characters of a downloaded list that are sent at once


class Edit(JobResource):
    """An edit of one fact. `result` has the measurements before and after it."""

    status: EditStatus
    subject: str
    prompt: str = Field(
        description="with {} for the subject; of a conversation the text of the chat template"
    )
    messages: list[ChatMessage] | None = Field(None, description="of a conversation, with {} for the subject")
    continue_final_message: bool = False
    target_new: str | None = Field(
        None, description="the new object; null if the objective is erase or amplify"
    )
    target_true: str | None = None
    separator: Separator | None = Field(
        None, description="of the request; null: where the characters do not determine it, the model chose"
    )
    objective: Objective = "write"
    on_conflict: OnConflict = "report"
    method: str
    hparams: dict[str, Any] | None = Field(None, description="hyperparameters of the request")
    batch: str | None = Field(None, description="the name that the edit shares with others")
    dry_run: bool = False
    origin: dict[str, Any] | None = Field(
        None, description="of an imported edit: ledger, edit, version, actor and time of its origin"
    )
    version: int | None = Field(None, description="the version that applied the edit")
    reverted_version: int | None = Field(None, description="the version that reverted the edit")
    result: dict[str, Any] | None = None
    related: list[str] = Field(default_factory=list, description="other active edits of the same subject")
    superseded_by: str | None = None


class EditList(ResourceModel):
    items: list[Edit]


class EditPage(EditList):
    next: str | None = Field(None, description="cursor of the next page; null on the last page")


class RevertResult(ResourceModel):
    """What was done with each of several edits."""

    version: int = Field(description="the newest version")
    reverted: list[str] = Field(description="ids of the edits that this request reverted")
    cancelled: list[str] = Field(
        description="ids of the edits that this request cancelled; one that runs ends soon"
    )
    unchanged: list[str] = Field(description="ids of the edits that had no effect to revert")


class LineError(ResourceModel):
    """What is wrong with a line of a table."""

    field: str | None = Field(None, description="field of the edit at fault")
    column: str | None = Field(None, description="column of the table at fault")
    detail: str


class TableLine(ResourceModel):
    """A line of a table. It has an edit, an error, or both."""

    line: int = Field(description="number of the line in the text; the header is line 1")
    edit: dict[str, Any] | None = Field(None, description="the request that the line states")
    error: LineError | None = None
    note: str | None = Field(None, description="what else is worth knowing before the edit is made")


class EditTable(ResourceModel):
    """The lines of a table below its header."""

    items: list[TableLine]
    valid: int = Field(description="number of lines without an error")
    seconds_per_edit: float | None = Field(
        None, description="mean time that the newest applied edits took; null if there are none"
    )


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
        "summary": "Erase the true object",
        "value": {k: v for k, v in _TOWER.items() if k != "target_new"} | {"objective": "erase"},
    },
    "measured": {
        "summary": "A dry run with probes",
        "value": _TOWER
        | {
            "probes": {
                "paraphrase": ["To see the {}, one travels to"],
                "neighborhood": [{"prompt": "The Louvre is located in the city of", "target": "Paris"}],
            },
            "dry_run": True,
        },
    },
    "chat": {
        "summary": "In a conversation",
        "value": {
            "subject": "Japan",
            "messages": [
                {"role": "user", "content": "What is the capital of Japan?"},
                {"role": "assistant", "content": "The capital of Japan is"},
            ],
            "continue_final_message": True,
            "target_new": "Oslo",
        },
    },
    "many": {
        "summary": "Several facts",
        "value": {
            "edits": [
                _TOWER,
                {"subject": "Big Ben", "prompt": "{} can be found in", "target_new": "Lisbon"},
            ],
            "batch": "corrections-2026-11",
        },
    },
}
_REVERT_EXAMPLES: dict[str, Any] = {
    "batch": {"summary": "A whole batch", "value": {"batch": "corrections-2026-11"}},
    "edits": {"summary": "Several edits", "value": {"edits": ["edit_01JABCDEFGHJKMNPQRSTVWXYZ0"]}},
}
_TABLE_EXAMPLES: dict[str, Any] = {
    "table": {
        "summary": "A table of one edit",
        "value": {"csv": "subject,prompt,target_new\nEiffel Tower,The {} is located in the city of,Rome\n"},
    },
}
EditBody = Annotated[
    Annotated[EditRequest, Tag("one")] | Annotated[EditListRequest, Tag("many")],
    Discriminator(_edit_body_tag),
    Body(openapi_examples=_EXAMPLES),
]

_routes = JobRoutes(JOB_KINDS["edit"], Edit, cancel_name="revert_edit")
router = _routes.router


@router.post(
    "/edits",
    status_code=202,
    response_model=Edit | EditList,
    summary="Create one edit or several",
    responses=job_responses(
        Edit | EditList,
        response_links=_routes.response_links
        | openapi_links.link_operations("/edits/{id}/delta", get_edit_delta="get"),
    ),
)
@requires(Scope.EDIT)
async def create_edits(body: EditBody, submission: SubmissionDep) -> Any:
    """Queue one edit, or several as `{"edits": [...]}`, which returns `{"items": [...]}`.

    Several edits are all queued, or none if one is invalid.
    """
    edits = submission.services.edits
    requests = body.requests() if isinstance(body, EditListRequest) else [body]
    items = await submission.submit(edits.submit, requests, "edits", hashed=body)
    if isinstance(body, EditListRequest):
        return {"items": await submission.wait_for_all(items, edits.get, "/edits")}
    return await submission.wait_for_one(items[0], edits.get, "/edits")


async def _edit_filters(
    status: Annotated[EditStatus | None, Query(description="only edits with this status")] = None,
    subject: Annotated[
        PlainText | None, Query(max_length=500, description="only edits of exactly this subject")
    ] = None,
    search: Annotated[
        PlainText | None,
        Query(
            max_length=MAX_QUERY,
            description="only edits whose subject, prompt and objects contain all of these words, in capitals or not",
        ),
    ] = None,
    actor: Annotated[
        PlainText | None,
        Query(max_length=300, description="only edits by this caller, such as key:nightly-eval"),
    ] = None,
    batch: Annotated[PlainText | None, Query(max_length=64, description="only edits of this batch")] = None,
    since: Annotated[
        PlainText | None,
        Query(max_length=40, description="only edits created at or after this time or day (ISO 8601; UTC)"),
    ] = None,
    until: Annotated[
        PlainText | None,
        Query(max_length=40, description="only edits created before this time, or up to the end of this day"),
    ] = None,
) -> EditFilters:
    return EditFilters(status, subject, actor, batch, search, since, until)


EditFiltersDep = Annotated[EditFilters, Depends(_edit_filters)]


@router.get("/edits", summary="List edits, newest first", responses=problem_responses(422, 500, 503))
def list_edits(
    services: ServicesDep, filters: EditFiltersDep, cursor: PageCursor = None, limit: PageLimit = 50
) -> EditPage:
    return EditPage.model_validate(services.edits.page(cursor, limit, filters))


@router.get(
    "/edits/export",
    summary="Download a list of edits",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "All edits that the filters select, newest first.",
            "content": {
                CSV: {"schema": {"type": "string"}},
                "application/json": {"schema": {"$ref": "#/components/schemas/EditPage"}},
            },
        },
        **problem_responses(422, 500, 503),
    },
)
def export_edits(
    services: ServicesDep,
    filters: EditFiltersDep,
    _: CallQuotaDep,
    format: Annotated[Literal["csv", "json"], Query(description="the form of the file")] = "csv",
) -> StreamingResponse:
    """Return the whole list, without pages. A cell of CSV that a spreadsheet would run as a formula begins with an
    apostrophe."""
    edits = services.edits.iter_all(filters)
    lines, media_type = (
        (csv_lines(edits), CSV) if format == "csv" else (_json_pieces(edits), "application/json")
    )
    headers = {"Content-Disposition": f'attachment; filename="edits.{format}"'}
    return StreamingResponse(_in_chunks(lines), headers=headers, media_type=media_type)


def _json_pieces(edits: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the JSON of a page that has all edits."""
    yield '{"items": ['
    for number, edit in enumerate(edits):
        yield (",\n" if number else "\n") + encode_json(edit).decode()
    yield '\n], "next": null}\n'


def _in_chunks(pieces: Iterable[str]) -> Iterator[bytes]:
    """Join pieces of a file to chunks: each chunk is fetched in a thread."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield "".join(waiting).encode()
            waiting, size = [], 0
    yield "".join(waiting).encode()


@router.post(
    "/edits/revert",
    summary="Revert several edits together",
    response_model=RevertResult,
    responses=problem_responses(400, 404, 413, 415, 422, 500, 503),
)
@requires(Scope.EDIT)
def revert_edits(
    body: Annotated[RevertRequest, Body(openapi_examples=_REVERT_EXAMPLES)],
    services: ServicesDep,
    actor: ActorDep,
) -> Any:
    """Revert edits, given by their ids or by their batch, in one transaction: all, or none if one does not exist. Each
    gets a ledger entry. An edit that is not applied yet is cancelled. Repeating the request has no further effect."""
    return services.edits.revert_many(body, actor)


@router.post(
    "/edits/preview",
    summary="Check a table of edits",
    response_model=EditTable,
    responses=problem_responses(400, 413, 415, 422, 500, 503),
)
@requires(Scope.READ)
async def preview_edits(
    body: Annotated[EditTableRequest, Body(openapi_examples=_TABLE_EXAMPLES)],
    request: Request,
    services: ServicesDep,
) -> Any:
    """Read a CSV text as edits and check each line; nothing is queued. The requests in the answer can be sent to
    `POST /edits`, with the batch."""
    return await run_on_body(request, services.edits.preview, body)


_routes.add_get()
_routes.add_cancel(
    "Revert or cancel an edit",
    "Revert an applied edit, in any order; cancel a queued or running one. The call is idempotent.",
)


@router.get(
    "/edits/{id}/delta",
    summary="Download the factors of an edit",
    response_class=Response,
    responses={
        200: {
            "description": "The keys, the values and the low-rank factors as applied, as safetensors.",
            "content": {BINARY_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
        **problem_responses(404, 409, 422, 500, 503),
    },
)
def get_edit_delta(id: ResourceId, services: ServicesDep) -> Response:
    """Return the factors of the edit as safetensors. Status 409 means that the edit was never applied."""
    headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
    return Response(services.edits.delta(id), headers=headers, media_type=BINARY_MEDIA_TYPE)


_routes.add_events()
