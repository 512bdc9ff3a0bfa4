"""A version in forms that others use, and the way back: export and import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from api.dependencies import Actor, Work, bearer
from api.disconnects import MAX_WAIT, Wait, ended, unless_gone, until_ended
from api.errors import WorkFailed, problems
from api.job_resource import Course
from api.job_submission import Submitted, answers
from api.protected_route import BINARY, Door
from api.routes.edits import Edits
from service.application import Operations
from service.errors import Conflict, InvalidInput
from service.schemas import Version

router = APIRouter(tags=["export"], route_class=Door, dependencies=[bearer])

AGAIN = {"Retry-After": "1"}
_FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class Export(Course):
    """An export that a worker makes. `links.self` is the file, once it is there."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    request: dict[str, Any]
    result: dict[str, Any] | None = None


class Imported(Edits):
    """The edits of a file, in its order."""

    known: list[str] = Field(description="ids of those that were here before, and were left alone")


@router.get(
    "/export",
    summary="The edits of a version, for use elsewhere",
    response_class=Response,
    responses={
        200: {
            "description": "The file: a zip with a PEFT LoRA adapter, or a file of safetensors.",
            "content": {"application/zip": _FILE, BINARY: _FILE},
        },
        202: {
            "description": "It is still being made: ask again.",
            "model": Export,
            "content": {"application/json": {}},
            "headers": {"Retry-After": {"schema": {"type": "string"}}},
        },
        **problems(409, 422, 500, 503),
    },
)
async def export(
    request: Request,
    work: Work,
    actor: Actor,
    wait: Wait,
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
        number, size, pieces = await run_in_threadpool(work.exports.edits, version)
        return _file(f"version-{number}.edits.safetensors", BINARY, size, pieces)
    await run_in_threadpool(work.models.check_attended, "export")
    job = await run_in_threadpool(work.exports.submit, version, format, actor)
    held = _held(work, job, wait if "prefer" in request.headers else None)
    job = await unless_gone(request, held) or job
    if not ended(job):
        return JSONResponse(job, 202, AGAIN)
    if job["status"] != "done":
        raise _failed(job)
    told = job["result"]
    return _file(told["file"], told["media_type"], told["bytes"], work.exports.file(job))


async def _held(work: Operations, job: dict[str, Any], wait: float | None) -> dict[str, Any]:
    """The export when it has ended, or after the wait; without one, as long as somebody is there to make it."""
    job = await until_ended(job, work.exports.get, work.jobs.events, MAX_WAIT if wait is None else wait)
    while wait is None and not ended(job):
        await run_in_threadpool(work.models.check_attended, "export")
        job = await until_ended(job, work.exports.get, work.jobs.events, MAX_WAIT)
    return job


def _failed(job: dict[str, Any]) -> Conflict | WorkFailed:
    """What a worker says against an export of this version is the version's doing; anything else is its own."""
    error = job["error"] or {"title": "", "detail": f"{job['id']} is {job['status']}: ask again."}
    return (Conflict if error["title"] in ("", InvalidInput.title) else WorkFailed)(error["detail"])


def _file(name: str, media_type: str, size: int, pieces: Iterator[bytes]) -> StreamingResponse:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}
    return StreamingResponse(pieces, headers=headers, media_type=media_type)


@router.post(
    "/import",
    status_code=202,
    response_model=Imported,
    summary="Edits that another ledger exported",
    openapi_extra={"requestBody": {"required": True, "content": {BINARY: _FILE}}},
    responses=answers(Imported, 409),
)
async def bring(request: Request, submitted: Submitted) -> Any:
    """The body is a file made by `GET /export?format=edits`. Its edits pass the guard here as any others, but are not searched for
    again: they land as they were found, or not at all. What is here already is left alone."""
    data, work = await request.body(), submitted.work
    once = submitted.once("import", data)
    items, known = await run_in_threadpool(work.imports.submit, data, submitted.actor, once, submitted.most)
    return {"items": await submitted.all(items, work.edits.get, "/edits"), "known": known}
