"""The conversations of edits, traces and records, rendered with the chat template before they are validated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from service.application.served_model import ServedModel
from service.application.validation import error_path
from service.datasets.user_records import UserRecord
from service.errors import InvalidInput, Unavailable
from service.kit.chat_format import MESSAGES_FIELD, Message
from service.kit.stated_fact import check_mentions, count_placeholders, fill_messages, mark_subject
from service.kit.text import check_text
from service.schemas import (
    AUTO,
    MAX_TEXT,
    ChatMessage,
    ChatProbe,
    EditRequest,
    NeighborhoodProbe,
    Probes,
    PromptForm,
    StatedForm,
)

MAX_CONVERSATIONS = 1000  #: of one request; one takes about 3 ms
#: that the conversations of one request may take together
RENDERING_SECONDS = 30.0

F = TypeVar("F", bound=PromptForm)
S = TypeVar("S", bound=StatedForm)


class ConversationRenderer:
    """Renders the conversations of one request."""

    def __init__(self, served_model: ServedModel) -> None:
        self._served_model = served_model
        self._rendered = 0
        self._deadline = time.monotonic() + RENDERING_SECONDS

    def render_edit(self, request: EditRequest) -> EditRequest:
        """Return an edit whose conversation and whose probes have the text of the template as their prompt."""
        stated = self.render_stated(request)
        if request.probes == AUTO:
            return stated
        paraphrases, neighbors = request.given_paraphrases, request.given_neighbors
        probes = Probes(
            paraphrase=AUTO
            if paraphrases is None
            else self._paraphrases(paraphrases, request.subject, "probes.paraphrase"),
            neighborhood=AUTO if neighbors is None else self._neighbors(neighbors, "probes.neighborhood"),
        )
        return stated.model_copy(update={"probes": probes})

    def render_record(self, record: UserRecord) -> UserRecord:
        """Return a record of an evaluation in the same way."""
        stated = self.render_stated(record)
        changes = {
            "paraphrases": self._paraphrases(record.paraphrases, record.subject, "paraphrases"),
            "neighborhood": self._neighbors(record.neighborhood, "neighborhood"),
        }
        return stated.model_copy(update=changes)

    def render_stated(self, request: S) -> S:
        """Return a request whose conversation has the text of the template as its prompt, both with `{}` for the
        subject."""
        request.check_form()
        if request.messages is None:
            return request
        messages = mark_subject(request.message_fields(), request.subject)
        marked = request.model_copy(update={"messages": [ChatMessage.model_validate(m) for m in messages]})
        return self._with_prompt(marked, messages)

    def _paraphrases(
        self, probes: Sequence[str | ChatProbe], subject: str, path: str
    ) -> list[str | ChatProbe]:
        rendered: list[str | ChatProbe] = []
        for number, probe in enumerate(probes):
            with error_path(f"{path}.{number}"):
                rendered.append(probe if isinstance(probe, str) else self._paraphrase(probe, subject))
        return rendered

    def _paraphrase(self, probe: ChatProbe, subject: str) -> ChatProbe:
        probe.check_form()
        messages = probe.message_fields()
        check_mentions(count_placeholders(messages))
        return self._with_prompt(probe, fill_messages(messages, subject))

    def _neighbors(self, probes: Sequence[NeighborhoodProbe], path: str) -> list[NeighborhoodProbe]:
        rendered: list[NeighborhoodProbe] = []
        for number, probe in enumerate(probes):
            with error_path(f"{path}.{number}"):
                probe.check_form()
                rendered.append(
                    probe if probe.messages is None else self._with_prompt(probe, probe.message_fields())
                )
        return rendered

    def _with_prompt(self, form: F, messages: Sequence[Message]) -> F:
        """Return a form with the text of the messages."""
        self._rendered += 1
        if self._rendered > MAX_CONVERSATIONS:
            raise InvalidInput(
                f"the request has more than {MAX_CONVERSATIONS} conversations: divide it into several.",
                MESSAGES_FIELD,
            )
        if time.monotonic() > self._deadline:
            raise Unavailable(
                "the conversations of the request take too long to render: send fewer at once, or try again."
            )
        chat = self._served_model.chat_format()
        text = chat.prompt_text(messages, form.continue_final_message)
        chat.encode(text)
        check_text(text, MESSAGES_FIELD)
        if len(text) > MAX_TEXT:
            raise InvalidInput(
                f"the conversation has {len(text)} characters in the form of the chat template, and may have {MAX_TEXT}: "
                "shorten it.",
                MESSAGES_FIELD,
            )
        return form.model_copy(update={"prompt": text})
