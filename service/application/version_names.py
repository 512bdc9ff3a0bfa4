"""Names of versions: give, list and delete them, and find the version that a request means."""

from __future__ import annotations

from functools import partial

from sqlalchemy.orm import Session

from service.application.served_model import get_served_model
from service.db.database import Database
from service.db.models import Model, VersionName
from service.errors import InvalidInput
from service.jobs.views import ResourceDict
from service.kit.pagination import decode_cursor, encode_cursor, validate_limit
from service.kit.versions import WORDS, NumberOf, format_model_id, resolve_version, split_model_id
from service.ledger import ledger, version_names
from service.schemas import Version


class VersionNameService:
    """The names of the versions of the served model."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def page(self, cursor: str | None = None, limit: int = 50) -> ResourceDict:
        """Return {"items": names in their order, "next": cursor or None}."""
        validate_limit(limit)
        after = decode_cursor(cursor, str)
        with self.database.read_session() as session:
            model = get_served_model(session)
            rows = version_names.list_names(session, model.fingerprint, after or "", limit + 1)
            next_cursor = encode_cursor(rows[limit - 1].name) if len(rows) > limit else None
            return {"items": [_serialize(row, model) for row in rows[:limit]], "next": next_cursor}

    def get(self, name: str) -> ResourceDict:
        """Return a name. Raises NotFound if no version has it."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            return _serialize(version_names.get_name(session, model.fingerprint, name), model)

    def give(self, name: str, version: Version, actor: str) -> tuple[ResourceDict, bool]:
        """Give a name to a version. Return the name, and whether it is new. Raises Conflict if another version has
        it."""
        if name in WORDS:
            raise InvalidInput(f"{name!r} has a meaning of its own: choose another name.", "name")
        with self.database.write_session() as session:
            model = get_served_model(session)
            ledger.lock_ledger(session, model.fingerprint)  # "head" cannot move meanwhile
            number = find_version(session, model, version)
            row, is_new = version_names.give_name(session, model.fingerprint, name, number, actor)
            return _serialize(row, model), is_new

    def delete(self, name: str, actor: str) -> ResourceDict:
        """Delete a name and return it; the version stays. Raises NotFound if no version has it."""
        with self.database.write_session() as session:
            model = get_served_model(session)
            ledger.lock_ledger(session, model.fingerprint)
            return _serialize(version_names.delete_name(session, model.fingerprint, name, actor), model)


def find_version(
    session: Session, model: Model, version: Version, field: str = "version", min_version: int | None = None
) -> int:
    """Return the number of a version: of a number, "head", "base", a name, or one of these after NAME@.

    Raises InvalidInput if there is none.
    """
    text = split_model_id(version, model.name) if isinstance(version, str) and "@" in version else None
    head = ledger.head(session, model.fingerprint)
    return resolve_version(
        version if text is None else text, head, min_version, field, names_of(session, model)
    )


def names_of(session: Session, model: Model) -> NumberOf:
    """Return the function that finds the version of a name."""
    return partial(version_names.number_of, session, model.fingerprint)


def _serialize(row: VersionName, model: Model) -> ResourceDict:
    return {
        "name": row.name,
        "version": row.version,
        "model": format_model_id(model.name, row.name),
        "actor": row.actor,
        "created": ledger.iso_utc(row.created),
    }
