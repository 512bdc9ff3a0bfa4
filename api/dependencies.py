"""Dependencies of routes: values from the request or the application."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request, Security
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from service.application import Services
from service.application.caller import CallerLimits
from service.errors import InvalidInput, NotFound
from service.jobs.broker import Broker

_RESOURCE_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EVENT_ID_PATTERN = re.compile(r"[0-9]{1,30}")
_IDEMPOTENCY_KEY_PATTERN = re.compile(r"[\x21-\x7e]{1,255}")

#: documents the API key; `api.protected_route` checks it before the body is read
bearer_scheme = Security(
    HTTPBearer(auto_error=False, description="An API key of the service, if it requires one.")
)


#: time in ISO 8601, UTC
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class ResourceModel(BaseModel):
    """A resource. Clients must ignore unknown members."""

    model_config = ConfigDict(extra="allow")


# These are `async` because FastAPI runs every synchronous dependency in a thread.


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _broker(request: Request) -> Broker:
    broker: Broker = request.app.state.broker
    return broker


async def _actor(request: Request) -> str:
    actor: str = request.state.actor
    return actor


async def _limits(request: Request) -> CallerLimits:
    limits: CallerLimits = request.state.limits
    return limits


async def _resource_id(
    id: Annotated[str, Path(description="id of the resource", examples=["edit_01JABCDEFGHJKMNPQRSTVWXYZ0"])],
) -> str:
    if not _RESOURCE_ID_PATTERN.fullmatch(id):
        raise NotFound("No resource has this id: the id is malformed.")
    return id


def _reject_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("contains a NUL or a lone surrogate: remove it.")
    return text


async def _idempotency_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            description="a unique string of up to 255 characters; a repeated request with the same key has no further effect"
        ),
    ] = None,
) -> str | None:
    if idempotency_key is not None and not _IDEMPOTENCY_KEY_PATTERN.fullmatch(idempotency_key):
        raise InvalidInput(
            "`Idempotency-Key` must be 1 to 255 visible ASCII characters without spaces, for example a UUID.",
            "Idempotency-Key",
        )
    return idempotency_key


async def _last_event_id(
    last_event_id: Annotated[
        str | None, Header(description="resume after this event; a malformed id is ignored")
    ] = None,
) -> str | None:
    return last_event_id if last_event_id and _EVENT_ID_PATTERN.fullmatch(last_event_id) else None


ServicesDep = Annotated[Services, Depends(_services)]
BrokerDep = Annotated[Broker, Depends(_broker)]
ActorDep = Annotated[str, Depends(_actor)]
LimitsDep = Annotated[CallerLimits, Depends(_limits)]
ResourceId = Annotated[str, Depends(_resource_id)]
IdempotencyKeyHeader = Annotated[str | None, Depends(_idempotency_key)]
LastEventIdHeader = Annotated[str | None, Depends(_last_event_id)]
PlainText = Annotated[str, AfterValidator(_reject_nul)]
PageCursor = Annotated[
    PlainText | None,
    Query(max_length=1000, description="`next` of the previous page; omit it for the first page"),
]
PageLimit = Annotated[
    int, Query(ge=1, le=200, description="maximum number of items; a page of large items has fewer")
]
