"""What a suite asks a model, and the model's answers. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import regex

from service.kit.answer import answer_object
from service.kit.text import mentions

ANSWER_TOKENS = 16  #: of a free answer
_STATEMENT_END = regex.compile(
    r"(?<=\p{Sentence_Terminal})(?=\s|\Z)|[\n\r\u2028\u2029]|(?<=[\u3002\uff01\uff1f])"
)


@dataclass(frozen=True)
class FreeText:
    """A prompt that the model continues greedily, to the end of its statement."""

    prompt: str


@dataclass(frozen=True)
class Choice:
    """A prompt with objects whose probabilities are compared."""

    prompt: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class NextToken:
    """A prompt after which the distribution of the next token is compared with that of the base model."""

    prompt: str


Question = FreeText | Choice | NextToken


@dataclass(frozen=True)
class TextAnswer:
    """A greedy continuation, up to the end of its statement."""

    text: str
    complete: bool  #: the statement, or the answer, ended by itself

    @property
    def object(self) -> str:
        """The object that it begins with, in small letters."""
        return answer_object(self.text, self.complete).casefold()

    def mentions(self, name: str) -> bool:
        """Whether it has this name."""
        return mentions(self.text, name)


@dataclass(frozen=True)
class ChoiceAnswer:
    """The joint log-probability of each object, in nats."""

    log_probs: tuple[float, ...]

    @property
    def prefers_first(self) -> bool:
        """Whether the first object is strictly more probable than every other one."""
        return all(self.log_probs[0] > other for other in self.log_probs[1:])


@dataclass(frozen=True)
class Divergence:
    """KL(p_base || p) of the next token, in nats."""

    kl: float


Answer = TextAnswer | ChoiceAnswer | Divergence
Answers = Mapping[Question, Answer]


def end_statement(text: str) -> tuple[str, bool]:
    """Return a continuation up to the end of its first statement, and whether it has such an end."""
    start = len(text) - len(text.lstrip())
    end = _STATEMENT_END.search(text, start)
    return (text, False) if end is None else (text[: end.start()], True)


def answer_json(answer: Answer) -> list[Any]:
    """Return an answer as JSON."""
    if isinstance(answer, TextAnswer):
        return [answer.text, answer.complete]
    return list(answer.log_probs) if isinstance(answer, ChoiceAnswer) else [answer.kl]


def read_answer(question: Question, value: list[Any]) -> Answer:
    """Return the answer to a question from its JSON."""
    if isinstance(question, FreeText):
        return TextAnswer(*value)
    return ChoiceAnswer(tuple(value)) if isinstance(question, Choice) else Divergence(*value)


def text_of(answers: Answers, prompt: str) -> TextAnswer:
    """Return the free answer after a prompt."""
    answer = answers[FreeText(prompt)]
    assert isinstance(answer, TextAnswer)
    return answer


def choice_of(answers: Answers, choice: Choice) -> ChoiceAnswer:
    """Return the log-probabilities of the objects of a choice."""
    answer = answers[choice]
    assert isinstance(answer, ChoiceAnswer)
    return answer


def divergence_of(answers: Answers, prompt: str) -> float:
    """Return the divergence of the next token after a prompt, in nats."""
    answer = answers[NextToken(prompt)]
    assert isinstance(answer, Divergence)
    return answer.kl
