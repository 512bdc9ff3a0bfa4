"""The model that is resident, its tokenizer and its newest version: what every question begins with."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import Unavailable


class Resident:
    """Knows the resident model of a database. Safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._known: tuple[Model, Tokenizer] | None = None  # the model as it was last registered

    def at_head(self) -> tuple[Model, Tokenizer, int]:
        """The resident model, its tokenizer and the newest version. Every call asks this, so it is one short question.

        A tokenizer's text has megabytes: it is read and parsed once for each registration of the model.
        """
        with self.database.glance() as connection:
            found = connection.execute(_NEWEST).one_or_none()
        if found is None:
            raise _no_model()
        if self._known is None or _registration(self._known[0]) != (found.fingerprint, found.registered):
            with self.database.read() as session:
                model = resident(session)
                self._known = model, Tokenizer.from_str(model.tokenizer)
        return *self._known, found.head or 0


def resident(session: Session) -> Model:
    """The model that a worker came up with last."""
    model = session.scalar(select(Model).order_by(Model.registered.desc()).limit(1))
    if model is None:
        raise _no_model()
    return model


def _no_model() -> Unavailable:
    return Unavailable(
        "no worker has loaded a model yet: ask again when one says that it is ready, or start one.",
        reasons=["no worker has loaded a model yet"],
    )


def _registration(model: Model) -> tuple[str, datetime]:
    return model.fingerprint, model.registered


#: which model is resident, since which registration, and its newest version
_NEWEST = (
    select(
        Model.fingerprint,
        Model.registered,
        select(func.max(LedgerEntry.version))
        .where(LedgerEntry.model == Model.fingerprint)
        .scalar_subquery()
        .label("head"),
    )
    .order_by(Model.registered.desc())
    .limit(1)
)
