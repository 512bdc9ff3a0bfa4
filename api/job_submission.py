"""How jobs are asked for, whatever their kind: by whom, under which key, and how long their end is waited for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Response
from pydantic import BaseModel

from api import openapi_links
from api.dependencies import Actor, Allowed, IdempotencyKey, Work
from api.disconnects import Wait, all_until_ended, ended
from api.errors import encode, problems
from service.application import Operations
from service.application.job_queue import Idempotency

Resource = dict[str, Any]


@dataclass(frozen=True)
class Submission:
    """A request for jobs, without what it asks for."""

    work: Operations
    actor: str
    most: int | None  #: jobs of this actor that may wait; None: as the settings say
    key: str | None
    wait: float
    response: Response

    def once(self, kind: str, body: BaseModel | bytes) -> Idempotency | None:
        """The key with a fingerprint of what was asked: of the bytes of a file, of a body whatever white space it had."""
        if self.key is None:
            return None
        if isinstance(body, bytes):
            asked = kind.encode() + body
        else:
            asked = encode({"kind": kind, "body": body.model_dump(mode="json")})
        return self.key, hashlib.sha256(asked).hexdigest()

    async def one(self, job: Resource, read: Callable[[str], Resource], folder: str) -> Resource:
        """The job as it stands when the wait is over."""
        return (await self.all([job], read, f"{folder}/{job['id']}"))[0]

    async def all(
        self, jobs: Sequence[Resource], read: Callable[[str], Resource], location: str
    ) -> list[Resource]:
        """The jobs as they stand when the wait is over; the answer says where they are, and by its status whether all ended."""
        jobs = await all_until_ended(jobs, read, self.work.jobs.events, self.wait)
        self.response.headers["Location"] = location
        self.response.status_code = 200 if all(map(ended, jobs)) else 202
        return jobs


async def _submission(
    work: Work, actor: Actor, allowed: Allowed, key: IdempotencyKey, wait: Wait, response: Response
) -> Submission:
    return Submission(work, actor, allowed.max_queued, key, wait, response)


Submitted = Annotated[Submission, Depends(_submission)]


def answers(
    model: Any, *more: int, then: openapi_links.Links | None = None
) -> dict[int | str, dict[str, Any]]:
    """The documentation of what a request for jobs is answered with; `then`: what can be done with it."""
    made: dict[str, Any] = {"headers": openapi_links.LOCATION} | ({} if then is None else {"links": then})
    return {
        200: {"description": "All that was asked for has ended within the wait.", "model": model, **made},
        202: {"description": "Queued.", **made},
        **problems(400, 413, 415, 422, 500, 503, *more),
    }
