"""The ledger of applied and reverted edits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from api.dependencies import PageCursor, PageLimit, ResourceModel, ServicesDep, Timestamp, bearer_scheme
from api.errors import problem_responses
from api.protected_route import ProtectedRoute
from service.schemas import VersionText

router = APIRouter(tags=["ledger"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class LedgerEntryResource(ResourceModel):
    """A ledger entry: the edit becomes active at this version, or is reverted at it."""

    version: int
    kind: Literal["apply", "revert"]
    edit_id: str
    actor: str
    at: Timestamp
    hash: str = Field(description="hash of this entry, chained to all previous entries through `previous`")


class LedgerPage(ResourceModel):
    items: list[LedgerEntryResource]
    next: str | None = Field(None, description="cursor of the next page; null on the last page")


class RecordPosition(ResourceModel):
    """An audit record."""

    position: int
    hash: str


class Verification(ResourceModel):
    """The result of a verification of the ledger."""

    ok: bool
    findings: list[Any] = Field(
        description="the first 1000 violations that were found; empty if the ledger is valid"
    )
    finding_count: int = Field(description="the number of violations that were found")
    entries: int
    head: int
    head_hash: str | None = Field(description="hash of the newest ledger entry, for `expect` later")
    record: RecordPosition | None = Field(description="newest audit record, for `expect_record` later")
    public_key: str | None = Field(description="public key of the newest audit records, in hexadecimal")
    replicas: list[dict[str, Any]] = Field(
        description="the newest 1000 weight digests that workers reported; `withdrawn` is set for workers in quarantine"
    )


@router.get(
    "/ledger",
    response_model=LedgerPage,
    summary="List ledger entries",
    responses=problem_responses(422, 500, 503),
)
def list_ledger_entries(
    services: ServicesDep,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
    version: Annotated[
        VersionText | None, Query(description="only entries up to this version: a number or a name")
    ] = None,
    order: Annotated[
        Literal["oldest", "newest"],
        Query(description="sort order; a cursor is valid for the order of its page only"),
    ] = "oldest",
) -> Any:
    return services.ledger.page(cursor, limit, version, newest_first=order == "newest")


class DiffSide(ResourceModel):
    """An edit that is active at a version."""

    edit_id: str
    version: int = Field(description="the version that applied the edit")
    actor: str
    at: Timestamp
    objective: str | None = None
    target_new: str | None = None
    target_true: str | None = None
    resolved_true: str | None = Field(None, description="the true object that the model said")
    method: str | None = None


class FactChange(ResourceModel):
    """A fact whose active edit differs between two versions."""

    change: Literal["added", "removed", "replaced"]
    subject: str
    prompt: str
    messages: list[dict[str, Any]] | None = Field(
        None, description="of a conversation, in place of the prompt"
    )
    before: DiffSide | None = Field(description="the edit at the first version; null if there is none")
    after: DiffSide | None = Field(description="the edit at the second version; null if there is none")


class VersionComparison(ResourceModel):
    before: int = Field(description="number of the first version")
    after: int = Field(description="number of the second version")
    items: list[FactChange]
    next: str | None = Field(None, description="cursor of the next page; null on the last page")


@router.get(
    "/ledger/diff",
    response_model=VersionComparison,
    summary="List the facts that differ between two versions",
    responses=problem_responses(422, 500, 503),
)
def diff_versions(
    services: ServicesDep,
    before: Annotated[VersionText, Query(description="the first version: a number or a name")],
    after: Annotated[VersionText, Query(description="the second version: a number or a name")] = "head",
    cursor: PageCursor = None,
    limit: PageLimit = 50,
) -> Any:
    """Return what is active for each fact at both versions, where it is not the same edit. A page ends at a number of
    subjects."""
    return services.version_diff.page(before, after, cursor, limit)


@router.get(
    "/ledger/verify",
    summary="Verify the ledger",
    response_model=Verification,
    responses=problem_responses(422, 429, 500, 503),
)
def verify_ledger(
    services: ServicesDep,
    expect: Annotated[
        str | None,
        Query(max_length=80, description="VERSION:HASH of a ledger entry that must be in the ledger"),
    ] = None,
    expect_record: Annotated[
        str | None,
        Query(max_length=80, description="POSITION:HASH of an audit record that must be in the database"),
    ] = None,
    full: Annotated[
        bool,
        Query(
            description="read the bytes of all factors; otherwise those of new edits, and a sixteenth of the others"
        ),
    ] = False,
) -> Any:
    """Recompute both hash chains and the digests of all recorded rows, verify the signatures, and compare the weight
    digests of the workers."""
    return services.ledger.verify(expect, expect_record, full)
