"""Whether the wordings of a fact agree: on what the model says, and on how probable the new object is."""

from __future__ import annotations

import math
from collections import Counter

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, Choice, FreeText, Question, choice_of, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs


def _questions(record: Record, _inputs: SuiteInputs) -> list[Question]:
    """Return every wording, to be continued and with the new object."""
    wordings = _wordings(record)
    return [*(FreeText(w) for w in wordings), *(Choice(w, (record.target_new,)) for w in wordings)]


def _measure(record: Record, _inputs: SuiteInputs, answers: Answers, _base: Answers) -> Measures:
    """Return the agreement of the wordings; None for a fact with one wording."""
    wordings = _wordings(record)
    if len(wordings) < 2:
        return {"agreement": None, "probability_spread": None}
    objects = Counter(text_of(answers, w).object for w in wordings)
    probabilities = [
        math.exp(choice_of(answers, Choice(w, (record.target_new,))).log_probs[0]) for w in wordings
    ]
    return {
        "agreement": max(objects.values()) / len(wordings),
        "probability_spread": max(probabilities) - min(probabilities),
    }


def _wordings(record: Record) -> tuple[str, ...]:
    return (record.text, *record.paraphrases)


CONSISTENCY = Suite(
    "consistency",
    "agreement of wordings",
    {
        "agreement": "largest share of the wordings of a fact after which the model says one object",
        "probability_spread": "greatest less least p(new) over the wordings of a fact",
    },
    _questions,
    _measure,
)
