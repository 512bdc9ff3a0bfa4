"""Speech: what a worker is asked to say, at a version that the ledger knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.application.served_model import Resident, resident
from service.application.validation import check_speech, check_version
from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import InvalidInput, QueueFull
from service.jobs.broker import Broker
from service.kit import crash_points
from service.kit.ids import request_id
from service.kit.text import check_tokens
from service.kit.versions import called, version_called
from service.ledger import ledger
from service.schemas import CompareRequest, GenerateRequest, SpeechRequest
from service.settings import Settings


@dataclass(frozen=True)
class Named:
    """A version under the name that it is asked for. Versions of one `state` have the same weights."""

    id: str
    version: int
    state: str
    created: datetime


@dataclass(frozen=True)
class Speech:
    """What was asked of a worker, pinned to a version, and the channel on which it comes."""

    channel: str
    request: SpeechRequest
    named: Named


class Calls:
    """Calls to workers, and the names of what they may speak for."""

    def __init__(self, database: Database, broker: Broker, settings: Settings, resident: Resident) -> None:
        self.database, self.broker, self.settings, self.resident = database, broker, settings, resident

    def generate(self, request: GenerateRequest) -> str:
        """Ask a worker to speak; the payload is the request as JSON. The answer comes on the channel returned.

        What is asked for beyond the model's positions is not refused: the text ends there, with "length".
        """
        self._check_tokens_asked(request)
        model, tokenizer, head = self.resident.at_head()
        check_version(head, request.version, request.min_version)
        for text in request.texts():
            check_tokens(tokenizer, text, None, model.info["positions"])
        return self._call("generate", request.model_dump(mode="json"))

    def complete(self, name: str, request: SpeechRequest) -> Speech:
        """Ask a worker to go on with prompts, at the version that the name means now.

        The version and the seed are settled here, so that whoever begins the answer anew says the same.
        """
        model, tokenizer, head = self.resident.at_head()
        version = version_called(name, model.name, head)
        self._check_tokens_asked(request, "max_tokens")
        check_speech(request, model, tokenizer)
        with self.database.read() as session:
            (named,) = _named(session, model, [(called(model.name, version), version)])
        request = request.model_copy(update={"version": version})
        return Speech(self._call("generate", request.model_dump(mode="json")), request, named)

    def names(self, recent: int = 20) -> list[Named]:
        """What the model and its versions are called: the head and the base, and by number the newest ones."""
        with self.database.read() as session:
            model = resident(session)
            head = ledger.head(session, model.fingerprint)
            always = [(model.name, head), (f"{model.name}@head", head), (f"{model.name}@base", 0)]
            numbers = range(head, max(head - recent, -1), -1)
            return _named(session, model, [*always, *((called(model.name, v), v) for v in numbers)])

    def named(self, name: str) -> Named:
        """The version that a name means now, under this name."""
        with self.database.read() as session:
            model = resident(session)
            version = version_called(name, model.name, ledger.head(session, model.fingerprint))
            return _named(session, model, [(name, version)])[0]

    def compare(self, request: CompareRequest) -> str:
        """Ask a worker to say one prompt on two versions; the payload is the request as JSON."""
        self._check_tokens_asked(request)
        model, tokenizer, head = self.resident.at_head()
        for version in request.versions:
            check_version(head, version, field="versions")
        check_tokens(tokenizer, request.prompt, None, model.info["positions"])
        return self._call("compare", request.model_dump(mode="json"))

    def ask_again(self, kind: str, channel: str, request: GenerateRequest | CompareRequest) -> None:
        """The same call on the same channel, because the broker has lost it: the whole answer comes anew."""
        self.broker.call(kind, request.model_dump(mode="json"), request_id.get(), channel)

    def _check_tokens_asked(
        self, request: GenerateRequest | CompareRequest, field: str = "max_new_tokens"
    ) -> None:
        most = self.settings.max_new_tokens
        if request.max_new_tokens > most:
            raise InvalidInput(f"`{field}` may be at most {most} here: ask for fewer.", field)

    def _call(self, kind: str, payload: dict[str, Any]) -> str:
        if self.broker.waiting(kind) >= self.settings.max_queue:
            raise QueueFull(f"{self.settings.max_queue} requests wait already: try again in a few seconds.")
        channel = self.broker.call(kind, payload, request_id.get())
        crash_points.reach("call.after")
        return channel


def _named(session: Session, model: Model, names: Sequence[tuple[str, int]]) -> list[Named]:
    """Names and the versions that they mean; the ledger knows what each is and since when."""
    known = select(LedgerEntry.version, LedgerEntry.state, LedgerEntry.at).where(
        LedgerEntry.model == model.fingerprint, LedgerEntry.version.in_({version for _, version in names})
    )
    made = {row.version: (row.state, row.at) for row in session.execute(known)}
    made[0] = ledger.state_of(model.fingerprint, []), model.created
    return [Named(name, version, *made[version]) for name, version in names]
