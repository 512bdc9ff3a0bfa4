"""The ledger: what was applied and reverted, by whom and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from api.dependencies import PageCursor, PageLimit, ResourceModel, ServicesDep, Timestamp, bearer_scheme
from api.errors import problem_responses
from api.protected_route import ProtectedRoute

router = APIRouter(tags=["ledger"], route_class=ProtectedRoute, dependencies=[bearer_scheme])


class LedgerEntryResource(ResourceModel):
    """One entry: from this version on the edit is active, or no longer."""

    version: int
    kind: Literal["apply", "revert"]
    edit_id: str
    actor: str
    at: Timestamp
    hash: str = Field(description="of this entry and, through `previous`, of all before it")


class LedgerPage(ResourceModel):
    items: list[LedgerEntryResource]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


class Verification(ResourceModel):
    ok: bool
    findings: list[Any] = Field(description="what is wrong, in words; empty when nothing is")
    entries: int
    head: int
    replicas: list[dict[str, Any]] = Field(
        description="digests of the weights that workers reported; `withdrawn` by those that took themselves out"
    )


@router.get(
    "/ledger",
    response_model=LedgerPage,
    summary="All entries, oldest first, or newest first",
    responses=problem_responses(422, 500, 503),
)
def list_ledger_entries(
    services: ServicesDep,
    cursor: PageCursor = None,
    limit: PageLimit = 50,
    version: Annotated[
        int | None, Query(ge=0, lt=2**63, description="only the entries up to this version")
    ] = None,
    order: Annotated[
        Literal["oldest", "newest"],
        Query(description="which come first; a cursor is good for the order it came from"),
    ] = "oldest",
) -> Any:
    return services.ledger.page(cursor, limit, version, newest_first=order == "newest")


@router.get("/ledger/verify", response_model=Verification, responses=problem_responses(422, 500, 503))
def verify_ledger(services: ServicesDep) -> Any:
    """Check the hash chain, every edit's factors and the digests of the replicas again."""
    return services.ledger.verify()
