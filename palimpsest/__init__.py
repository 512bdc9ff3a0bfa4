"""Python client of Palimpsest, a service that locates, edits and reverts facts in GPT models.

    from palimpsest import Client

    with Client() as client:
        edit = client.edit("Eiffel Tower", "The {} is located in the city of", "Rome")
        print(client.generate("The Eiffel Tower is located in the city of", max_new_tokens=3))
        client.revert(edit)

`AsyncClient` has the same calls for asyncio.
"""

from palimpsest.client import AsyncClient, Client
from palimpsest.endpoints import ChatNeighbour, ChatPrompt, EditRequest, Message, Neighbour, Probes, Version
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
    Export,
    Generation,
    Job,
    JobFailure,
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
    "ChatNeighbour",
    "ChatPrompt",
    "Client",
    "Comparison",
    "Conflict",
    "Edit",
    "EditRejected",
    "EditRequest",
    "Entry",
    "Evaluation",
    "Export",
    "FieldError",
    "Forbidden",
    "Generation",
    "InvalidRequest",
    "Job",
    "JobError",
    "JobFailed",
    "JobFailure",
    "Message",
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
