"""What a suite of an evaluation is. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, Question
from service.kit.chat_format import ChatFormat


@dataclass(frozen=True)
class SuiteInputs:
    """What suites need besides a record."""

    prefixes: tuple[str, ...] = ()  #: texts sampled from the base model
    statements: Mapping[str, str] | None = None  #: subject of a record -> its true statement
    chat: ChatFormat | None = None  #: None for a model without a chat template


@dataclass(frozen=True)
class Suite:
    """Questions about a record, and the measures of their answers.

    `measure` is given the answers of a version and those of the base model. A measure is None where the record has
    nothing to ask."""

    name: str
    title: str
    measures: Mapping[str, str]  #: name -> description
    questions: Callable[[Record, SuiteInputs], list[Question]]
    measure: Callable[[Record, SuiteInputs, Answers, Answers], Measures]
    needs_chat: bool = False  #: it asks in conversations
    needs_prefixes: bool = False  #: it asks after sampled texts

    def describe(self) -> dict[str, Any]:
        """Return the entry of the suite in GET /models."""
        return {
            "name": self.name,
            "title": self.title,
            "measures": dict(self.measures),
            "needs_chat": self.needs_chat,
        }


def share(outcomes: Sequence[bool]) -> float | None:
    """Return the share of true outcomes; None of none."""
    return sum(outcomes) / len(outcomes) if outcomes else None
