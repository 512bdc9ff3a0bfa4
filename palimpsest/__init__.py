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
    EditTable,
    Entry,
    Evaluation,
    Export,
    FactChange,
    Generation,
    Job,
    JobFailure,
    Model,
    NamedVersion,
    NextToken,
    Progress,
    Resource,
    RevertResult,
    Side,
    TableLine,
    Token,
    Trace,
    Training,
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
    "EditTable",
    "Entry",
    "Evaluation",
    "Export",
    "FactChange",
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
    "NamedVersion",
    "Neighbour",
    "NextToken",
    "NotFound",
    "PalimpsestError",
    "Probes",
    "Progress",
    "Resource",
    "RevertResult",
    "ServerError",
    "Side",
    "TableLine",
    "Token",
    "TooManyRequests",
    "Trace",
    "Training",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "Usage",
    "Verification",
    "Version",
    "Worker",
]
