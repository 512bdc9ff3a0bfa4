"""Submission of jobs: actor, idempotency key and wait, for all kinds of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Response
from pydantic import BaseModel

from api import openapi_links
from api.dependencies import ActorDep, IdempotencyKeyHeader, LimitsDep, ServicesDep
from api.disconnects import WaitSeconds, is_finished, wait_until_all_finished
from api.errors import encode_json, problem_responses
from service.application import Services
from service.application.caller import CallerLimits
from service.application.job_queue import Idempotency

ResourceDict = dict[str, Any]


@dataclass(frozen=True)
class JobSubmission:
    """The parts of a request for jobs that do not depend on their kind."""

    services: Services
    actor: str
    limits: CallerLimits
    idempotency_key: str | None
    wait_seconds: float
    response: Response

    def idempotency(self, kind: str, body: BaseModel | bytes) -> Idempotency | None:
        """Return the idempotency key with a digest of the request: of the bytes of a file, or of the parsed body."""
        if self.idempotency_key is None:
            return None
        if isinstance(body, bytes):
            payload = kind.encode() + body
        else:
            payload = encode_json({"kind": kind, "body": body.model_dump(mode="json")})
        return self.idempotency_key, hashlib.sha256(payload).hexdigest()

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
    services: ServicesDep,
    actor: ActorDep,
    limits: LimitsDep,
    idempotency_key: IdempotencyKeyHeader,
    wait_seconds: WaitSeconds,
    response: Response,
) -> JobSubmission:
    return JobSubmission(services, actor, limits, idempotency_key, wait_seconds, response)


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
