"""The served model, its tokenizer and its newest version."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import NoChatTemplate, Unavailable
from service.kit.chat_format import MESSAGES_FIELD, ChatFormat
from service.kit.template_renderer import TemplateRenderer
from service.kit.text_encoder import TextEncoder

#: the member of `Model.info` with the chat template and the special tokens
CHAT_INFO = "chat"


class ServedModel:
    """Caches the served model of a database. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._cached: tuple[Model, TextEncoder, ChatFormat | None] | None = None  # of the latest registration
        self._renderer = TemplateRenderer()

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
                self._cached = model, encoder, self._chat_format_of(model, encoder)
        model, encoder, _ = self._cached
        return model, encoder, newest.head or 0

    def chat_format(self) -> ChatFormat:
        """Return the form of conversations with the served model. Raises NoChatTemplate if it has none."""
        model, _, _ = self.current()
        chat_format = None if self._cached is None else self._cached[2]
        if chat_format is None:
            raise NoChatTemplate(
                f"the model {model.name!r} has no chat template, so it has no form for messages: send a `prompt` in "
                "their place (to POST /v1/completions below /v1), or start the service with a chat model.",
                MESSAGES_FIELD,
            )
        return chat_format

    def _chat_format_of(self, model: Model, encoder: TextEncoder) -> ChatFormat | None:
        chat = model.info.get(CHAT_INFO)
        if chat is None:
            return None
        return ChatFormat(chat["template"], chat["special_tokens"], encoder, self._renderer)


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
