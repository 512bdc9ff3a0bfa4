"""The model that is resident, its tokenizer and its newest version: what every question begins with."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import Unavailable


class ServedModel:
    """Knows the resident model of a database. Safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._cached: tuple[Model, Tokenizer] | None = None  # the model as it was last registered

    def current(self) -> tuple[Model, Tokenizer, int]:
        """The resident model, its tokenizer and the newest version. Every call asks this, so it is one short question.

        A tokenizer's text has megabytes: it is read and parsed once for each registration of the model.
        """
        with self.database.autocommit_read() as connection:
            newest = connection.execute(_NEWEST_MODEL).one_or_none()
        if newest is None:
            raise _no_model_loaded()
        if self._cached is None or _registration(self._cached[0]) != (newest.fingerprint, newest.registered):
            with self.database.read_session() as session:
                model = get_served_model(session)
                self._cached = model, Tokenizer.from_str(model.tokenizer)
        return *self._cached, newest.head or 0


def get_served_model(session: Session) -> Model:
    """The model that a worker came up with last."""
    model = session.scalar(select(Model).order_by(Model.registered.desc()).limit(1))
    if model is None:
        raise _no_model_loaded()
    return model


def _no_model_loaded() -> Unavailable:
    return Unavailable(
        "no worker has loaded a model yet: ask again when one says that it is ready, or start one.",
        reasons=["no worker has loaded a model yet"],
    )


def _registration(model: Model) -> tuple[str, datetime]:
    return model.fingerprint, model.registered


#: which model is resident, since which registration, and its newest version
_NEWEST_MODEL = (
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
