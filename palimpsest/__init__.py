"""A client of Palimpsest: locate, edit and roll back facts inside a resident GPT model.

    from palimpsest import Client

    with Client() as client:
        edit = client.edit("Eiffel Tower", "The {} is located in the city of", "Rome")
        print(client.generate("The Eiffel Tower is located in the city of", max_new_tokens=3))
        client.revert(edit)

`AsyncClient` is the same for asyncio. Neither needs more than httpx.
"""

from palimpsest.client import AsyncClient, Client
from palimpsest.endpoints import EditRequest, Neighbour, Probes, Version
from palimpsest.errors import (
    Conflict,
    EditRejected,
    FieldError,
    Forbidden,
    InvalidRequest,
    JobError,
    JobFailed,
    NotFound,
    PalimpsestError,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from palimpsest.resources import (
    Comparison,
    Edit,
    Entry,
    Evaluation,
    Generation,
    Job,
    Model,
    NextToken,
    Progress,
    Resource,
    Side,
    Token,
    Trace,
    Usage,
    Verification,
    Worker,
)

__all__ = [
    "AsyncClient",
    "Client",
    "Comparison",
    "Conflict",
    "Edit",
    "EditRejected",
    "EditRequest",
    "Entry",
    "Evaluation",
    "FieldError",
    "Forbidden",
    "Generation",
    "InvalidRequest",
    "Job",
    "JobError",
    "JobFailed",
    "Model",
    "Neighbour",
    "NextToken",
    "NotFound",
    "PalimpsestError",
    "Probes",
    "Progress",
    "Resource",
    "ServerError",
    "Side",
    "Token",
    "TooManyRequests",
    "Trace",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "Usage",
    "Verification",
    "Version",
    "Worker",
]
