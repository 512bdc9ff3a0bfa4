"""Submission of jobs: actor, idempotency key and wait, for all kinds of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from api import openapi_links
from api.dependencies import ActorDep, IdempotencyKeyHeader, LimitsDep, ServicesDep
from api.disconnects import WaitSeconds, is_finished, wait_until_all_finished
from api.errors import encode_json, problem_responses
from api.protected_route import run_on_body
from service.application import Services
from service.application.caller import CallerLimits
from service.application.job_queue import Idempotency

ResourceDict = dict[str, Any]
T = TypeVar("T")
#: of a service: request, actor, idempotency key, limits of the caller -> result
Submit = Callable[[Any, str, Idempotency | None, CallerLimits], T]
FILE_CHUNK = 1_000_000  #: bytes of a file that are read at once


@dataclass(frozen=True)
class JobSubmission:
    """The parts of a request for jobs that do not depend on their kind."""

    request: Request
    services: Services
    actor: str
    limits: CallerLimits
    idempotency_key: str | None
    wait_seconds: float
    response: Response

    async def submit(
        self, submit: Submit[T], body: Any, kind: str, hashed: BaseModel | IO[bytes] | None = None
    ) -> T:
        """Return the result of a service's `submit`. The body is hashed for the idempotency key, unless `hashed` is."""

        def work() -> T:
            idempotency = self._idempotency(kind, body if hashed is None else hashed)
            return submit(body, self.actor, idempotency, self.limits)

        return await run_on_body(self.request, work)

    def _idempotency(self, kind: str, body: BaseModel | IO[bytes]) -> Idempotency | None:
        """Return the idempotency key with a digest of the request: of the bytes of a file, or of the parsed body."""
        if self.idempotency_key is None:
            return None
        pieces = _json_pieces(kind, body) if isinstance(body, BaseModel) else _file_pieces(kind, body)
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        return self.idempotency_key, digest.hexdigest()

    async def wait_for_one(
        self, job: ResourceDict, fetch: Callable[[str], ResourceDict], collection_path: str
    ) -> ResourceDict:
        """Return the job when it has ended, or its state after the wait."""
        return (await self.wait_for_all([job], fetch, f"{collection_path}/{job['id']}"))[0]

    async def wait_for_all(
        self, jobs: Sequence[ResourceDict], fetch: Callable[[str], ResourceDict], location: str
    ) -> list[ResourceDict]:
        """Return the jobs after the wait. Sets `Location`, and status 200 if all have ended, else 202."""
        jobs = await wait_until_all_finished(jobs, fetch, self.services.jobs.events, self.wait_seconds)
        self.response.headers["Location"] = location
        self.response.status_code = 200 if all(map(is_finished, jobs)) else 202
        return jobs


async def _submission(
    request: Request,
    services: ServicesDep,
    actor: ActorDep,
    limits: LimitsDep,
    idempotency_key: IdempotencyKeyHeader,
    wait_seconds: WaitSeconds,
    response: Response,
) -> JobSubmission:
    return JobSubmission(request, services, actor, limits, idempotency_key, wait_seconds, response)


def _json_pieces(kind: str, body: BaseModel) -> Iterator[bytes]:
    """Yield the JSON of {"kind": kind, "body": body}. Each item of a list is encoded alone: the encoder of the
    standard library holds the interpreter's lock for a whole text."""
    yield b'{"kind": ' + encode_json(kind) + b', "body": {'
    lists = [name for name in type(body).model_fields if isinstance(getattr(body, name), list)]
    fields = body.model_dump(mode="json", exclude=set(lists))
    for number, name in enumerate(type(body).model_fields):
        yield (b", " if number else b"") + encode_json(name) + b": "
        if name not in lists:
            yield encode_json(fields[name])
            continue
        for place, item in enumerate(getattr(body, name)):
            value = item.model_dump(mode="json") if isinstance(item, BaseModel) else item
            yield (b", " if place else b"[") + encode_json(value)
        yield b"]" if getattr(body, name) else b"[]"
    yield b"}}"


def _file_pieces(kind: str, file: IO[bytes]) -> Iterator[bytes]:
    yield kind.encode()
    file.seek(0)
    while chunk := file.read(FILE_CHUNK):
        yield chunk


SubmissionDep = Annotated[JobSubmission, Depends(_submission)]


def job_responses(
    model: Any, *statuses: int, response_links: openapi_links.OpenApiLinks | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of a route that creates jobs, with links to the operations on them."""
    headers_and_links: dict[str, Any] = {"headers": openapi_links.LOCATION_HEADER} | (
        {} if response_links is None else {"links": response_links}
    )
    return {
        200: {
            "description": "All jobs ended within the wait.",
            "model": model,
            **headers_and_links,
        },
        202: {"description": "Queued.", **headers_and_links},
        **problem_responses(400, 413, 415, 422, 500, 503, *statuses),
    }
