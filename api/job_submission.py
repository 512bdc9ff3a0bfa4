"""How jobs are asked for, whatever their kind: by whom, under which key, and how long their end is waited for."""

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
from service.application.job_queue import Idempotency

ResourceDict = dict[str, Any]


@dataclass(frozen=True)
class JobSubmission:
    """A request for jobs, without what it asks for."""

    services: Services
    actor: str
    max_queued: int | None  #: jobs of this actor that may wait; None: as the settings say
    idempotency_key: str | None
    wait_seconds: float
    response: Response

    def idempotency(self, kind: str, body: BaseModel | bytes) -> Idempotency | None:
        """The key with a fingerprint of what was asked: of the bytes of a file, of a body whatever white space it had."""
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
        """The job as it stands when the wait is over."""
        return (await self.wait_for_all([job], fetch, f"{collection_path}/{job['id']}"))[0]

    async def wait_for_all(
        self, jobs: Sequence[ResourceDict], fetch: Callable[[str], ResourceDict], location: str
    ) -> list[ResourceDict]:
        """The jobs as they stand when the wait is over; the answer says where they are, and by its status whether all ended."""
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
    return JobSubmission(services, actor, limits.max_queued, idempotency_key, wait_seconds, response)


SubmissionDep = Annotated[JobSubmission, Depends(_submission)]


def job_responses(
    model: Any, *statuses: int, response_links: openapi_links.OpenApiLinks | None = None
) -> dict[int | str, dict[str, Any]]:
    """The documentation of what a request for jobs is answered with; `then`: what can be done with it."""
    headers_and_links: dict[str, Any] = {"headers": openapi_links.LOCATION_HEADER} | (
        {} if response_links is None else {"links": response_links}
    )
    return {
        200: {
            "description": "All that was asked for has ended within the wait.",
            "model": model,
            **headers_and_links,
        },
        202: {"description": "Queued.", **headers_and_links},
        **problem_responses(400, 413, 415, 422, 500, 503, *statuses),
    }
