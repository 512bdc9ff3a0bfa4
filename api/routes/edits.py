"""Edits: create, list, read and revert."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, Query, Response
from pydantic import Discriminator, Field, Tag

from api import openapi_links
from api.dependencies import PageCursor, PageLimit, PlainText, ResourceId, ResourceModel, ServicesDep
from api.errors import problem_responses
from api.job_resource import EditStatus, JobResource, JobRoutes
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import BINARY_MEDIA_TYPE, requires
from service.application.api_keys import Scope
from service.jobs.job_kinds import JOB_KINDS
from service.kit.separator import Separator
from service.schemas import ChatMessage, EditListRequest, EditRequest, Objective, OnConflict


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
            ]
        },
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
    requests = body.edits if isinstance(body, EditListRequest) else [body]
    items = await submission.submit(edits.submit, requests, "edits", hashed=body)
    if isinstance(body, EditListRequest):
        return {"items": await submission.wait_for_all(items, edits.get, "/edits")}
    return await submission.wait_for_one(items[0], edits.get, "/edits")


@router.get("/edits", summary="List edits, newest first", responses=problem_responses(422, 500, 503))
def list_edits(
    services: ServicesDep,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
    status: Annotated[EditStatus | None, Query(description="only edits with this status")] = None,
    subject: Annotated[
        PlainText | None, Query(max_length=500, description="only edits of exactly this subject")
    ] = None,
) -> EditPage:
    return EditPage.model_validate(services.edits.page(cursor, limit, status=status, subject=subject))


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
