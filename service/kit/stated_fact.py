"""A fact as a request states it: a subject in a prompt, or in a conversation. This module does not import torch.

A conversation is rendered once, with `{}` in place of the subject, and stored as the prompt of the fact beside its
messages. The statement about this or another subject is that text with the subject filled in. It is used as it is: a
template that contains the date gives another text tomorrow, and an edit must stay what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput
from service.kit.chat_format import MESSAGES_FIELD, Message
from service.kit.text import (
    PLACEHOLDER,
    RenderedText,
    Span,
    Statement,
    fact_key,
    fill_prompt,
    spelled_mentions,
)

MAX_MENTIONS = 64  #: of the subject in one conversation


@dataclass(frozen=True)
class StatedFact:
    """A subject, and the prompt or the conversation that is about it."""

    subject: str
    prompt: str  #: with `{}` for the subject; for a conversation the text of the chat template
    messages: Sequence[Message] = ()  #: with `{}` for the subject; empty for a prompt
    continued: bool = False  #: the last message is continued

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> StatedFact:
        """Return the fact of a request, or of an entry of the ledger, as JSON."""
        return cls(
            str(fields["subject"]),
            str(fields["prompt"]),
            fields.get("messages") or (),
            bool(fields.get("continue_final_message")),
        )

    @property
    def key(self) -> str:
        """What equal facts have in common. That of a conversation does not depend on the template."""
        if not self.messages:
            return fact_key(self.subject, self.prompt)
        messages = [[m["role"], m["content"]] for m in self.messages]
        return fact_key(self.subject, json.dumps([messages, self.continued], ensure_ascii=False))

    @property
    def wording(self) -> str:
        """The prompt, or the message with the last mention of the subject."""
        return self._last_content if self.messages else self.prompt

    @property
    def written_texts(self) -> dict[str, str]:
        """What the caller wrote, with the subject filled in, by field: the prompt, or the content of each message."""
        if not self.messages:
            return {"prompt": _fill(self.prompt, self.subject)}
        filled = fill_messages(self.messages, self.subject)
        return {f"{MESSAGES_FIELD}.{number}.content": m["content"] for number, m in enumerate(filled)}

    def statement(self, subject: str | None = None) -> Statement:
        """Return the statement about the subject, or about another one."""
        name = self.subject if subject is None else subject
        return self._rendered_statement(name) if self.messages else fill_prompt(self.prompt, name)

    @property
    def _last_content(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if PLACEHOLDER in m["content"]), "")

    def _rendered_statement(self, subject: str) -> Statement:
        start, last = self._message_span()
        before, filled_from_start = (
            _fill(part, subject) for part in (self.prompt[:start], self.prompt[start:])
        )
        begin = len(before) + len(_fill(self.prompt[start:last], subject))
        span = begin, begin + len(subject)
        sentence = None
        if self.continued and PLACEHOLDER in self.messages[-1]["content"]:
            sentence = Statement(filled_from_start, (span[0] - len(before), span[1] - len(before)))
        return Statement(RenderedText(before + filled_from_start), span, len(before), sentence)

    def _message_span(self) -> Span:
        """Return where the message with the last mention begins in the rendered text, and where that mention is.

        Raise InvalidInput if the template changes that message, or the number of mentions.
        """
        check_mentions(self.prompt.count(PLACEHOLDER))
        before, _, after = self._last_content.rpartition(PLACEHOLDER)
        before, after = before.lstrip(), after.rstrip()
        last = self.prompt.rfind(PLACEHOLDER)
        start = last - len(before)
        is_kept = (
            start >= 0
            and self.prompt.startswith(before, start)
            and self.prompt.startswith(after, last + len(PLACEHOLDER))
            and self.prompt.count(PLACEHOLDER) == count_placeholders(self.messages)
        )
        if not is_kept:
            raise InvalidInput(
                "the model's chat template does not keep the messages with the subject as they are: write the fact as a "
                "`prompt`.",
                MESSAGES_FIELD,
            )
        return start, last


def mark_subject(messages: Sequence[Message], subject: str) -> list[Message]:
    """Return messages with `{}` in place of the subject: as they are if one of them has it, else with every mention in
    the subject's spelling replaced. Raise InvalidInput without a mention, or with more than MAX_MENTIONS."""
    marked = list(messages)
    if not count_placeholders(messages):
        marked = [{**m, "content": _with_placeholders(m["content"], subject)} for m in messages]
    count = count_placeholders(marked)
    if count == 0:
        raise InvalidInput(
            f"the subject {subject!r} does not occur in the messages: spell it as a message does, or write "
            f"{PLACEHOLDER} in its place.",
            "subject",
        )
    check_mentions(count)
    return marked


def check_mentions(count: int) -> None:
    """Raise InvalidInput if a conversation mentions its subject too often."""
    if count > MAX_MENTIONS:
        raise InvalidInput(
            f"the messages mention the subject {count} times, and may do so {MAX_MENTIONS} times: shorten them.",
            MESSAGES_FIELD,
        )


def count_placeholders(messages: Sequence[Message]) -> int:
    """Return the number of `{}` in messages."""
    return sum(m["content"].count(PLACEHOLDER) for m in messages)


def fill_messages(messages: Sequence[Message], subject: str) -> list[Message]:
    """Return messages with the subject in place of every `{}`."""
    return [{**m, "content": _fill(m["content"], subject)} for m in messages]


def _fill(text: str, subject: str) -> str:
    return text.replace(PLACEHOLDER, subject)


def _with_placeholders(content: str, subject: str) -> str:
    parts, end = [], 0
    for start, after in spelled_mentions(content, subject):
        parts.append(content[end:start])
        end = after
    return PLACEHOLDER.join([*parts, content[end:]])
