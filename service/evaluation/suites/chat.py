"""Whether an edit holds in a conversation, and whether the model still names the same subject there."""

from __future__ import annotations

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, FreeText, Question, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs, share
from service.kit.chat_format import ChatFormat

#: what a user says to ask for a statement
REQUESTS = ("{}", "Finish the sentence: {}", "What comes next? {}")
DESCRIPTION = "Tell me about {}."


def _questions(record: Record, inputs: SuiteInputs) -> list[Question]:
    """Return the statement as a user's messages, and the request for a description of the subject."""
    assert inputs.chat is not None
    requests = _requests(record)
    return [FreeText(_conversation(inputs.chat, text)) for text in (*requests, _description(record))]


def _measure(record: Record, inputs: SuiteInputs, answers: Answers, _base: Answers) -> Measures:
    """Return the shares of conversations with the new object, and with the subject."""
    assert inputs.chat is not None
    said = [text_of(answers, _conversation(inputs.chat, text)) for text in _requests(record)]
    new = [answer.mentions(record.target_new) for answer in said]
    subject = [answer.mentions(record.subject) for answer in said]
    description = text_of(answers, _conversation(inputs.chat, _description(record)))
    return {
        "chat_contains": share(new),
        "chat_says": share([a and b for a, b in zip(new, subject, strict=True)]),
        "chat_other_subject": share([a and not b for a, b in zip(new, subject, strict=True)]),
        "chat_description": float(description.mentions(record.subject)),
    }


def _requests(record: Record) -> list[str]:
    return [] if record.messages else [request.replace("{}", record.text) for request in REQUESTS]


def _description(record: Record) -> str:
    return DESCRIPTION.replace("{}", record.subject)


def _conversation(chat: ChatFormat, text: str) -> str:
    return chat.prompt_text([{"role": "user", "content": text}])


CHAT = Suite(
    "chat",
    "the edit in conversations",
    {
        "chat_contains": "the answer in a conversation has the new object",
        "chat_says": "it has the new object and the subject",
        "chat_other_subject": "it has the new object and not the subject; lower is better",
        "chat_description": "the answer to a request about the subject has its name",
    },
    _questions,
    _measure,
    needs_chat=True,
)
