"""A version in forms that others use, and the way back: export and import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from api.dependencies import ActorDep, ServicesDep, bearer_scheme
from api.disconnects import MAX_WAIT, WaitSeconds, cancel_on_disconnect, is_finished, wait_until_finished
from api.errors import problem_responses
from api.job_resource import JobResource
from api.job_submission import SubmissionDep, job_responses
from api.protected_route import BINARY_MEDIA_TYPE, ProtectedRoute
from api.routes.edits import EditList
from service.application import Services
from service.errors import Conflict, InvalidInput, PalimpsestError, error_from_document
from service.schemas import Version

router = APIRouter(tags=["export"], route_class=ProtectedRoute, dependencies=[bearer_scheme])

RETRY_HEADERS = {"Retry-After": "1"}
_BINARY_CONTENT: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class Export(JobResource):
    """An export that a worker makes. `links.self` is the file, once it is there."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    result: dict[str, Any] | None = None


class ImportResult(EditList):
    """The edits of a file, in its order."""

    already_present: list[str] = Field(description="ids of those that were here before, and were left alone")


@router.get(
    "/export",
    summary="The edits of a version, for use elsewhere",
    response_class=Response,
    responses={
        200: {
            "description": "The file: a zip with a PEFT LoRA adapter, or a file of safetensors.",
            "content": {"application/zip": _BINARY_CONTENT, BINARY_MEDIA_TYPE: _BINARY_CONTENT},
        },
        202: {
            "description": "It is still being made: ask again.",
            "model": Export,
            "content": {"application/json": {}},
            "headers": {"Retry-After": {"schema": {"type": "string"}}},
        },
        **problem_responses(409, 422, 500, 503),
    },
)
async def export_version(
    request: Request,
    services: ServicesDep,
    actor: ActorDep,
    wait: WaitSeconds,
    version: Annotated[Version, Query()] = "head",
    format: Annotated[
        Literal["peft", "safetensors", "edits"],
        Query(
            description="`peft`: a LoRA adapter; `safetensors`: the edited weights alone; `edits`: all that the ledger knows of the "
            "edits, for `POST /import` elsewhere"
        ),
    ] = "peft",
) -> Response:
    """The answer is held until the file is there; with `Prefer: wait=SECONDS` for so long, and then it is `202`."""
    if format == "edits":
        number, size, chunks = await run_in_threadpool(services.exports.export_edit_set, version)
        return _file_response(f"version-{number}.edits.safetensors", BINARY_MEDIA_TYPE, size, chunks)
    await run_in_threadpool(services.models.require_worker_for, "export")
    job = await run_in_threadpool(services.exports.submit, version, format, actor)
    pending = _wait_for_export(services, job, wait if "prefer" in request.headers else None)
    job = await cancel_on_disconnect(request, pending) or job
    if not is_finished(job):
        return JSONResponse(job, 202, RETRY_HEADERS)
    if job["status"] != "done":
        raise _export_error(job)
    result = job["result"]
    return _file_response(
        result["file"], result["media_type"], result["bytes"], services.exports.stream_file(job)
    )


async def _wait_for_export(services: Services, job: dict[str, Any], wait: float | None) -> dict[str, Any]:
    """The export when it has ended, or after the wait; without one, as long as somebody is there to make it."""
    job = await wait_until_finished(
        job, services.exports.get, services.jobs.events, MAX_WAIT if wait is None else wait
    )
    while wait is None and not is_finished(job):
        await run_in_threadpool(services.models.require_worker_for, "export")
        job = await wait_until_finished(job, services.exports.get, services.jobs.events, MAX_WAIT)
    return job


def _export_error(job: dict[str, Any]) -> PalimpsestError:
    """Return why an export has no file: a conflict if this version cannot be exported, else the error of the worker."""
    if job["error"] is None:
        return Conflict(f"{job['id']} is {job['status']}: ask again.")
    error = error_from_document(job["error"])
    return Conflict(error.detail) if isinstance(error, InvalidInput) else error


def _file_response(name: str, media_type: str, size: int, chunks: Iterator[bytes]) -> StreamingResponse:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}
    return StreamingResponse(chunks, headers=headers, media_type=media_type)


@router.post(
    "/import",
    status_code=202,
    response_model=ImportResult,
    summary="Edits that another ledger exported",
    openapi_extra={"requestBody": {"required": True, "content": {BINARY_MEDIA_TYPE: _BINARY_CONTENT}}},
    responses=job_responses(ImportResult, 409),
)
async def import_edits(request: Request, submission: SubmissionDep) -> Any:
    """The body is a file made by `GET /export?format=edits`. Its edits pass the guard here as any others, but are not searched for
    again: they land as they were found, or not at all. What is here already is left alone."""
    data, services = await request.body(), submission.services
    idempotency = submission.idempotency("import", data)
    items, already_present = await run_in_threadpool(
        services.imports.submit, data, submission.actor, idempotency, submission.max_queued
    )
    return {
        "items": await submission.wait_for_all(items, services.edits.get, "/edits"),
        "already_present": already_present,
    }
