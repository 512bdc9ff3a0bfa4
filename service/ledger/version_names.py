"""Names of versions, in the caller's transaction. A caller that writes holds the ledger's lock.

A version is a position in an append-only ledger, so a named version can be served for as long as the ledger exists,
whatever is applied or reverted later. A name does not move: it is deleted, and given again.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import VersionName, now
from service.errors import Conflict, NotFound
from service.ledger import audit
from service.ledger.audit_coverage import VERSION_NAME


def number_of(session: Session, model: str, name: str) -> int | None:
    """Return the version that has a name; None if there is none."""
    row = session.get(VersionName, (model, name))
    return None if row is None or row.deleted else row.version


def get_name(session: Session, model: str, name: str) -> VersionName:
    """Return the row of a name. Raises NotFound if no version has it."""
    row = session.get(VersionName, (model, name))
    if row is None or row.deleted:
        raise NotFound(f"no version has the name {name!r}: GET /versions lists the names.")
    return row


def list_names(
    session: Session, model: str, after: str = "", limit: int | None = None
) -> Sequence[VersionName]:
    """Return the rows of the names after one, in their order."""
    query = select(VersionName).where(
        VersionName.model == model, VersionName.deleted.is_(None), VersionName.name > after
    )
    return session.scalars(query.order_by(VersionName.name).limit(limit)).all()


def give_name(session: Session, model: str, name: str, version: int, actor: str) -> tuple[VersionName, bool]:
    """Give a name to a version. Return its row, and whether it is new. Raises Conflict if another version has it."""
    row = session.get(VersionName, (model, name))
    if row is not None and not row.deleted:
        if row.version == version:
            return row, False
        raise Conflict(
            f"the name {name!r} is that of version {row.version}: delete it first, or give another name.",
            version=row.version,
        )
    if row is None:
        row = VersionName(model=model, name=name)
        session.add(row)
    row.version, row.actor, row.created, row.deleted, row.deleted_by = version, actor, now(), None, None
    audit.append(session, VERSION_NAME, [(model, name)])
    return row, True


def delete_name(session: Session, model: str, name: str, actor: str) -> VersionName:
    """Delete a name; the version stays. Raises NotFound if no version has it."""
    row = get_name(session, model, name)
    row.deleted, row.deleted_by = now(), actor
    audit.append(session, VERSION_NAME, [(model, name)])
    return row
