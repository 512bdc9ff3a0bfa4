"""Exports of a version as a file, and imports of edit sets."""

from __future__ import annotations

from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import Field

from api.dependencies import ResourceId, ServicesDep
from api.errors import problem_responses
from api.job_resource import JobRoutes, ResultJobResource
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import BINARY_MEDIA_TYPE, ParsedRequest, RequestBody, requires
from api.routes.edits import EditList
from service.application.api_keys import Scope
from service.jobs.job_kinds import JOB_KINDS

_BINARY_CONTENT: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class Export(ResultJobResource):
    """A version as a file. `result` describes the file and `links.file` is its address."""


class ImportResult(EditList):
    """The edits of an edit set, in its order."""

    already_present: list[str] = Field(
        description="ids of the edits that were already present and were not changed"
    )


_EXAMPLES: dict[str, Any] = {
    "adapter": {"summary": "A LoRA adapter of the newest version", "value": {"format": "peft"}},
    "edits": {"summary": "An edit set of a version", "value": {"version": "head", "format": "edits"}},
}

_routes = JobRoutes(JOB_KINDS["export"], Export, examples=_EXAMPLES)
router = _routes.router
_routes.add_create(
    "Make a file of a version: a LoRA adapter, the edited weights, or an edit set. The same version and format give the "
    "same export while it is open or its file is kept. An edit set is done at once."
)
_routes.add_list()
_routes.add_get()
_routes.add_cancel()
_routes.add_events()


@router.get(
    "/exports/{id}/file",
    summary="Download the file of an export",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A zip archive with a PEFT LoRA adapter, or a safetensors file.",
            "content": {"application/zip": _BINARY_CONTENT, BINARY_MEDIA_TYPE: _BINARY_CONTENT},
        },
        **problem_responses(404, 409, 422, 500, 503),
    },
)
def get_export_file(id: ResourceId, services: ServicesDep) -> StreamingResponse:
    """Return the file. Status 409 means that the export is not done or failed, or that its file is no longer kept."""
    file = services.exports.open_file(id)
    headers = {"Content-Disposition": f'attachment; filename="{file.name}"', "Content-Length": str(file.size)}
    return StreamingResponse(file.chunks, headers=headers, media_type=file.media_type)


@router.post(
    "/import",
    status_code=202,
    response_model=ImportResult,
    summary="Import an edit set",
    openapi_extra={"requestBody": {"required": True, "content": {BINARY_MEDIA_TYPE: _BINARY_CONTENT}}},
    responses=job_responses(ImportResult, 409),
)
@requires(Scope.EDIT, RequestBody.FILE)
async def import_edits(request: ParsedRequest, submission: SubmissionDep) -> Any:
    """Commit the edits of an edit set, which `POST /exports` with `format: "edits"` creates.

    The factors of the file are used: they are evaluated by the guard like those of any edit, and are not computed
    again. Edits that are already present are not changed.
    """
    services = submission.services
    items, already_present = await submission.submit(
        services.imports.submit, request.received_body.file, "import"
    )
    return {
        "items": await submission.wait_for_all(items, services.edits.get, "/edits"),
        "already_present": already_present,
    }
