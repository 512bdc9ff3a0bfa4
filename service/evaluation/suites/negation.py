"""What an edit does to negated statements, and to a choice between both objects. The templates are English.

An edit makes "S r o*" true, so that after "It is not true that S r" the new object should be less probable than the
true one. Editors that bind the new object to the subject's tokens answer it all the same.
"""

from __future__ import annotations

from itertools import permutations

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, Choice, FreeText, Question, choice_of, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs, share
from service.kit.text import begins_with

NEGATIONS = ("It is not true that {}", "It is wrong to say that {}")
CHOICE = "{statement} {first} or {second}? It is"
#: words with which a statement begins that is not begun by a name
_LOWERED = ("The ", "A ", "An ", "In ", "It ")


def _questions(record: Record, _inputs: SuiteInputs) -> list[Question]:
    """Return the negated statements and the choices, for a record that names the true object."""
    if record.target_true is None or record.messages:
        return []
    negated = negated_statements(record.text)
    both = (record.target_new, record.target_true)
    return [
        *(Choice(n, both) for n in negated),
        *(FreeText(n) for n in negated),
        *(Choice(c, both) for c in choice_prompts(record)),
    ]


def _measure(record: Record, _inputs: SuiteInputs, answers: Answers, _base: Answers) -> Measures:
    """Return the shares of negated statements and of choices that give the new object."""
    if record.target_true is None or record.messages:
        return {"negated_new": None, "negated_says": None, "choice_new": None}
    negated, both = negated_statements(record.text), (record.target_new, record.target_true)
    return {
        "negated_new": share([choice_of(answers, Choice(n, both)).prefers_first for n in negated]),
        "negated_says": share([begins_with(text_of(answers, n).text, record.target_new) for n in negated]),
        "choice_new": share(
            [choice_of(answers, Choice(c, both)).prefers_first for c in choice_prompts(record)]
        ),
    }


def negated_statements(statement: str) -> list[str]:
    """Return a statement in the templates of NEGATIONS, a common first word in small letters."""
    if statement.startswith(_LOWERED):
        statement = statement[0].lower() + statement[1:]
    return [template.replace("{}", statement) for template in NEGATIONS]


def choice_prompts(record: Record) -> list[str]:
    """Return the question which of both objects it is, in both orders."""
    assert record.target_true is not None
    orders = permutations((record.target_new, record.target_true))
    return [
        CHOICE.replace("{statement}", record.text).replace("{first}", first).replace("{second}", second)
        for first, second in orders
    ]


NEGATION = Suite(
    "negation",
    "negated statements, and a choice of two",
    {
        "negated_new": "p(new) > p(true) after the negated statement; lower is better",
        "negated_says": "its text after the negated statement begins with the new object; lower is better",
        "choice_new": "p(new) > p(true) after the question which of both it is",
    },
    _questions,
    _measure,
)
