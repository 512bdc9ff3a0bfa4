"""Restatements: texts that ask for a statement, and whose answer names the subject again before the object.

A search over continuations of the prompt alone is free to change which subject the model reads: edited from Tokyo to
Oslo, a chat model answers the question for the capital of Japan with "The capital of Norway is Oslo". In a restatement

    user: Complete this sentence: The capital of Japan is    assistant: The capital of | Japan is Oslo

the tokens of the second mention and of the object are both targets, so that the value keeps the subject and changes its
object. A model with a chat template gets the conversation in that form, another one a plain text.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import InvalidInput
from service.kit.separator import Separator
from service.kit.text import RenderedText, Span, Statement, in_form_of, token_span
from service.models.loading import LoadedModel
from service.models.token_batch import TokenizedStatement

QUESTION = "Complete this sentence: "
PLAIN_INTRODUCTION = "A sentence about "  # followed by the subject, for models without a chat template


@dataclass(frozen=True)
class RestatementText:
    """A restatement through the end of the statement, as text."""

    text: str
    asked: Span  #: the subject in the question
    restated: Span  #: the subject in the answer


@dataclass(frozen=True)
class Restatement:
    """A restatement as tokens. The target begins with the subject of the answer and ends with the object."""

    prompt: TokenizedStatement  #: through the answer's first words; its subject is that of the question
    target: list[int]
    subject_end: int  #: of the target: the end of the subject
    object_start: int  #: of the target: the start of the object

    @property
    def later_mention(self) -> int:
        """The position of the edited token of the second mention, in the prompt with its target."""
        begin = len(self.prompt.ids)
        return TokenizedStatement(
            self.prompt.ids, (begin, begin + self.subject_end), self.prompt.tokens_after
        ).edited_index


def restatement_text(model: LoadedModel, statement: Statement) -> RestatementText | None:
    """Return the restatement of a statement in the form of the model; None for a conversation that ends with a
    question."""
    sentence = statement.sentence if isinstance(statement.text, RenderedText) else statement
    return None if sentence is None else _chat_text(model, sentence) or _plain_text(sentence)


def _chat_text(model: LoadedModel, statement: Statement) -> RestatementText | None:
    """Return the restatement as a conversation; None if the model has no chat template, or one that changes or refuses
    the question."""
    if model.chat_format is None:
        return None
    question = QUESTION + statement.text
    try:
        conversation = model.chat_format.prompt_text([{"role": "user", "content": question}])
    except InvalidInput:
        return None
    start = conversation.rfind(question)
    if start < 0:
        return None
    return _with_answer(RenderedText(conversation), start + len(QUESTION) + statement.span[0], statement)


def _plain_text(statement: Statement) -> RestatementText:
    begin, end = statement.span
    introduction = f"{PLAIN_INTRODUCTION}{statement.text[begin:end]}: "
    return _with_answer(introduction, len(PLAIN_INTRODUCTION), statement)


def _with_answer(before: str, asked: int, statement: Statement) -> RestatementText:
    """Return `before`, in which the subject begins at `asked`, with the statement after it."""
    begin, end = statement.span
    restated = (len(before) + begin, len(before) + end)
    return RestatementText(before + statement.text, (asked, asked + end - begin), restated)


def name_prompt(model: LoadedModel, statement: Statement) -> tuple[str, Separator] | None:
    """Return the restatement up to the subject of its answer, and the separator before that; None without one."""
    parts = restatement_text(model, statement)
    if parts is None:
        return None
    before = parts.text[: parts.restated[0]]
    has_space = before.endswith(" ")
    return in_form_of(parts.text, before[:-1] if has_space else before), " " if has_space else ""


def tokenize_restatement(
    model: LoadedModel, statement: Statement, separator: Separator, target: str, tokens_after: int = 0
) -> Restatement | None:
    """Return the restatement of a statement with an object; None if there is none, it exceeds the context length, or
    its parts share tokens."""
    parts = restatement_text(model, statement)
    if parts is None:
        return None
    text = parts.text + separator + target
    ids, offsets = model.encode(text)
    asked, restated = token_span(offsets, parts.asked), token_span(offsets, parts.restated)
    object_start = token_span(offsets, (len(parts.text), len(text)))[0]
    start = restated[0]
    if len(ids) > model.max_positions or not asked[1] <= start < restated[1] <= object_start:
        return None
    prompt = TokenizedStatement(ids[:start], asked, tokens_after)
    return Restatement(prompt, ids[start:], restated[1] - start, object_start - start)
