"""Generation and comparison: validate, resolve the version, and send the call to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.application.caller import Caller
from service.application.costs import generation_tokens, new_tokens
from service.application.served_model import ServedModel, get_served_model
from service.application.validation import validate_generation
from service.application.version_names import find_version, names_of
from service.db.database import Database
from service.db.models import LedgerEntry, Model
from service.errors import InvalidInput, QueueFull
from service.jobs.broker import Broker
from service.kit import crash_points
from service.kit.ids import request_id
from service.kit.versions import format_model_id, is_given_name, parse_model_id, resolve_version
from service.ledger import ledger, version_names
from service.schemas import (
    CompareRequest,
    ContinuedText,
    GenerateRequest,
    Version,
    WorkerCompareRequest,
    WorkerGenerateRequest,
)
from service.settings import Settings

NOBODY = Caller("")


@dataclass(frozen=True)
class ModelVersionName:
    """A version under a model name. Versions with the same `state_hash` have the same weights."""

    id: str
    version: int
    state_hash: str
    created: datetime


@dataclass(frozen=True)
class PendingGeneration:
    """A generation that was sent to a worker, with its version and the channel of its events."""

    channel: str
    request: WorkerGenerateRequest
    model_version: ModelVersionName


class GenerationService:
    """Sends calls to workers, and resolves model names."""

    def __init__(
        self, database: Database, broker: Broker, settings: Settings, served_model: ServedModel
    ) -> None:
        self.database, self.broker, self.settings, self.served_model = (
            database,
            broker,
            settings,
            served_model,
        )

    @property
    def max_new_tokens(self) -> int:
        """The most new tokens of one request, over all its generations."""
        return self.settings.max_new_tokens

    def generate(self, request: GenerateRequest, caller: Caller = NOBODY) -> str:
        """Send a generation to a worker and return the channel of its events.

        `max_new_tokens` beyond the positions of the model is accepted: the text then ends with the reason "length".
        """
        _, encoder, head = self.served_model.current()
        self._check_max_new_tokens(request)
        resolve_version(request.version, head, request.min_version)
        if not isinstance(request, WorkerGenerateRequest):
            for text in request.prompt_texts():
                encoder.check(text)
        return self._send_call("generate", request, caller)

    @staticmethod
    def needs_rendering(request: GenerateRequest | CompareRequest) -> bool:
        """Whether a request has messages, or a name of a version, in place of what workers read. Does not block."""
        return request.messages is not None or any(map(is_given_name, _versions_of(request)))

    def render_generation(self, request: GenerateRequest) -> GenerateRequest:
        """Return a request as workers read it: with the tokens of its conversation, and the number of its version."""
        (version,) = self._numbered(_versions_of(request), "version")
        rendered = request if request.messages is None else self._with_tokens(request)
        return rendered.model_copy(update={"version": version})

    def render_comparison(self, request: CompareRequest) -> CompareRequest:
        """Return a request as workers read it: with the tokens of its conversation, and the numbers of its versions."""
        versions = self._numbered(_versions_of(request), "versions")
        if request.messages is None:
            return request.model_copy(update={"versions": versions})
        text, tokens, end_token_ids = self._render(request)
        fields = request.model_dump(exclude={"messages", "continue_final_message"}) | {"versions": versions}
        return WorkerCompareRequest(**fields, text=text, tokens=tokens, end_token_ids=end_token_ids)

    def _numbered(self, versions: Sequence[Version], field: str) -> tuple[Version, ...]:
        """Return versions with numbers for names. A worker finds the number of "head" when it admits the call."""
        if not any(map(is_given_name, versions)):
            return tuple(versions)
        with self.database.read_session() as session:
            model = get_served_model(session)
            return tuple(find_version(session, model, v, field) if is_given_name(v) else v for v in versions)

    def _with_tokens(self, request: GenerateRequest) -> WorkerGenerateRequest:
        """Return a request with the tokens of its conversation in the place of `messages`."""
        _, tokens, end_token_ids = self._render(request)
        fields = request.model_dump(exclude={"messages", "continue_final_message"})
        return WorkerGenerateRequest(**fields | {"tokens": [tokens], "end_token_ids": end_token_ids})

    def _render(self, request: ContinuedText) -> tuple[str, list[int], list[int]]:
        """Return the text of a conversation, its tokens, and the tokens that end the answer."""
        chat = self.served_model.chat_format()
        messages = [message.model_dump() for message in request.messages or ()]
        text = chat.prompt_text(messages, request.continue_final_message)
        return text, chat.encode(text), list(chat.end_token_ids)

    def create_completion(
        self,
        name: str,
        request: WorkerGenerateRequest,
        caller: Caller = NOBODY,
        length_field: str = "max_tokens",
    ) -> PendingGeneration:
        """Send a completion, of prompts or of a conversation, at the version that the model name currently means.

        `length_field` is the name that the caller gave to the number of new tokens. The version and the seed are fixed
        here, so that another worker that starts again produces the same text.
        """
        model, encoder, head = self.served_model.current()
        with self.database.read_session() as session:
            version = parse_model_id(name, model.name, head, names_of(session, model))
            (model_version,) = _version_names(
                session, model, [(format_model_id(model.name, version), version)]
            )
        self._check_max_new_tokens(request, length_field)
        if request.messages is None:
            validate_generation(request, encoder)
        else:
            request = self._with_tokens(request)
        request = request.model_copy(update={"version": version})
        return PendingGeneration(self._send_call("generate", request, caller), request, model_version)

    def list_version_names(self, recent: int = 20, most_names: int = 100) -> list[ModelVersionName]:
        """Return the model names of the newest version, the base model, the first `most_names` versions with a given
        name, and the `recent` newest versions by number."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            head = ledger.head(session, model.fingerprint)
            always = [(model.name, head), (f"{model.name}@head", head), (f"{model.name}@base", 0)]
            given = version_names.list_names(session, model.fingerprint, limit=most_names)
            always += [(format_model_id(model.name, row.name), row.version) for row in given]
            numbers = range(head, max(head - recent, -1), -1)
            return _version_names(
                session, model, [*always, *((format_model_id(model.name, v), v) for v in numbers)]
            )

    def resolve_version_name(self, name: str) -> ModelVersionName:
        """Return the version that a model name currently means."""
        with self.database.read_session() as session:
            model = get_served_model(session)
            head = ledger.head(session, model.fingerprint)
            version = parse_model_id(name, model.name, head, names_of(session, model))
            return _version_names(session, model, [(name, version)])[0]

    def compare(self, request: CompareRequest, caller: Caller = NOBODY) -> str:
        """Send a comparison to a worker and return the channel of its events."""
        _, encoder, head = self.served_model.current()
        self._check_max_new_tokens(request)
        for version in request.versions:
            resolve_version(version, head, field="versions")
        if request.prompt is not None:
            encoder.check(request.prompt)
        return self._send_call("compare", request, caller)

    def count_tokens(self, request: GenerateRequest | CompareRequest) -> int:
        """Return the tokens that a request may need. Does not block."""
        return generation_tokens(request, self.served_model.positions)

    def resubmit(
        self,
        kind: str,
        channel: str,
        request: GenerateRequest | CompareRequest,
        caller: Caller = NOBODY,
    ) -> None:
        """Send a call again on its channel after the broker lost it."""
        self._send(kind, request, caller, channel)

    def _check_max_new_tokens(
        self, request: GenerateRequest | CompareRequest, field: str = "max_new_tokens"
    ) -> None:
        most, needed = self.settings.max_new_tokens, new_tokens(request, self.served_model.positions)
        if request.max_new_tokens > most:
            raise InvalidInput(f"`{field}` may be at most {most} on this service.", field)
        if needed <= most:
            return
        raise InvalidInput(
            f"the request may need {needed} new tokens over all its generations, and this service allows {most}: "
            f"lower `{field}`, or send fewer prompts at once.",
            field,
        )

    def _send_call(self, kind: str, request: GenerateRequest | CompareRequest, caller: Caller) -> str:
        """Send a call. Raises QueueFull when a limit of waiting calls is reached."""
        limit = self.settings.max_queue
        if self.broker.queue_depth(kind) >= limit:
            raise QueueFull(f"{limit} requests are queued already: try again in a few seconds.")
        limit = caller.limits.max_queued or self.settings.max_queued_per_key
        if self.broker.queue_depth(kind, caller.actor) >= limit:
            raise QueueFull(f"{limit} of your requests are queued already: wait until one has been answered.")
        channel = self._send(kind, request, caller)
        crash_points.crash_point("call.after")
        return channel

    def _send(
        self,
        kind: str,
        request: GenerateRequest | CompareRequest,
        caller: Caller,
        channel: str | None = None,
    ) -> str:
        cost = self.count_tokens(request) / caller.limits.weight
        payload = request.model_dump(mode="json")
        return self.broker.send_call(kind, payload, request_id.get(), channel, caller.actor, cost)


def _versions_of(request: GenerateRequest | CompareRequest) -> Sequence[Version]:
    return (request.version,) if isinstance(request, GenerateRequest) else request.versions


def _version_names(
    session: Session, model: Model, names: Sequence[tuple[str, int]]
) -> list[ModelVersionName]:
    """Return model names with the state and the creation time of their versions."""
    query = select(LedgerEntry.version, LedgerEntry.state, LedgerEntry.at).where(
        LedgerEntry.model == model.fingerprint, LedgerEntry.version.in_({version for _, version in names})
    )
    state_by_version = {row.version: (row.state, row.at) for row in session.execute(query)}
    state_by_version[0] = ledger.state_hash(model.fingerprint, []), model.created
    return [ModelVersionName(name, version, *state_by_version[version]) for name, version in names]
