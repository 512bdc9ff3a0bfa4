"""The served model, its tokenizer and its newest version."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import Unavailable
from service.kit.text_encoder import TextEncoder


class ServedModel:
    """Caches the served model of a database. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._cached: tuple[Model, TextEncoder] | None = None  # of the latest registration

    @property
    def positions(self) -> int | None:
        """The context length of the model; None before the first request. Does not block."""
        return None if self._cached is None else self._cached[0].info["positions"]

    def current(self) -> tuple[Model, TextEncoder, int]:
        """Return the served model, the encoder of its texts and the newest version. Every request calls this, so it is
        one short query.

        The tokenizer has megabytes of JSON: it is read and parsed once per registration of the model.
        """
        with self.database.autocommit_read() as connection:
            newest = connection.execute(_NEWEST_MODEL).one_or_none()
        if newest is None:
            raise _no_model_loaded()
        if self._cached is None or _registration(self._cached[0]) != (newest.fingerprint, newest.registered):
            with self.database.read_session() as session:
                model = get_served_model(session)
                tokenizer = Tokenizer.from_str(model.tokenizer)
                encoder = TextEncoder(tokenizer, model.info["positions"], model.info["vocabulary"])
                self._cached = model, encoder
        return *self._cached, newest.head or 0


def get_served_model(session: Session) -> Model:
    """Return the model that a worker registered last. Raises Unavailable if there is none."""
    model = session.scalar(select(Model).order_by(Model.registered.desc()).limit(1))
    if model is None:
        raise _no_model_loaded()
    return model


def _no_model_loaded() -> Unavailable:
    return Unavailable(
        "no worker has loaded a model yet: start a worker, or try again when one is ready.",
        reasons=["no worker has loaded a model yet"],
    )


def _registration(model: Model) -> tuple[str, datetime]:
    return model.fingerprint, model.registered


#: the served model, its registration time and its newest version
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
