"""The ledger: what was applied and reverted, by whom and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from api.dependencies import Cursor, Limit, Moment, Resource, Work, bearer
from api.errors import problems
from api.protected_route import Door

router = APIRouter(tags=["ledger"], route_class=Door, dependencies=[bearer])


class Entry(Resource):
    """One entry: from this version on the edit is active, or no longer."""

    version: int
    kind: Literal["apply", "revert"]
    edit_id: str
    actor: str
    at: Moment
    hash: str = Field(description="of this entry and, through `previous`, of all before it")


class Ledger(Resource):
    items: list[Entry]
    next: str | None = Field(None, description="the cursor of the next page; null on the last")


class Verification(Resource):
    ok: bool
    findings: list[Any] = Field(description="what is wrong, in words; empty when nothing is")
    entries: int
    head: int
    replicas: list[dict[str, Any]] = Field(
        description="digests of the weights that workers reported; `withdrawn` by those that took themselves out"
    )


@router.get(
    "/ledger",
    response_model=Ledger,
    summary="All entries, oldest first, or newest first",
    responses=problems(422, 500, 503),
)
def listing(
    work: Work,
    cursor: Cursor = None,
    limit: Limit = 50,
    version: Annotated[
        int | None, Query(ge=0, lt=2**63, description="only the entries up to this version")
    ] = None,
    order: Annotated[
        Literal["oldest", "newest"],
        Query(description="which come first; a cursor is good for the order it came from"),
    ] = "oldest",
) -> Any:
    return work.ledger.page(cursor, limit, version, newest_first=order == "newest")


@router.get("/ledger/verify", response_model=Verification, responses=problems(422, 500, 503))
def verify(work: Work) -> Any:
    """Check the hash chain, every edit's factors and the digests of the replicas again."""
    return work.ledger.verify()
