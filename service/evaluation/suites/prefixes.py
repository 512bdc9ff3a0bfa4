"""Whether an edit holds in the middle of a text: after sampled texts, and after a statement about something else."""

from __future__ import annotations

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, Choice, FreeText, Question, choice_of, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs, share
from service.kit.text import begins_with

PREFIXES = 10  # sampled texts
PREFIX_SEED = 7919  #: added to the seed of the plan: searches sample their contexts with small seeds


def _questions(record: Record, inputs: SuiteInputs) -> list[Question]:
    """Return the prompt after each sampled text, and after the statement of another record."""
    if record.messages:
        return []
    after_statement = prompt_after_statement(record, inputs)
    choices: list[Question] = [Choice(p, _objects(record)) for p in prompts_after_prefixes(record, inputs)]
    return choices if after_statement is None else [*choices, FreeText(after_statement)]


def _measure(record: Record, inputs: SuiteInputs, answers: Answers, _base: Answers) -> Measures:
    """Return the efficacy after other texts."""
    after_statement = None if record.messages else prompt_after_statement(record, inputs)
    says = None
    if after_statement is not None:
        says = float(begins_with(text_of(answers, after_statement).text, record.target_new))
    prefixed = [
        choice_of(answers, Choice(p, _objects(record))).prefers_first
        for p in prompts_after_prefixes(record, inputs)
    ]
    return {"ES_prefixed": share(prefixed), "says_after_statement": says}


def prompts_after_prefixes(record: Record, inputs: SuiteInputs) -> list[str]:
    """Return the prompt after each sampled text; none where there is no object to compare with."""
    if record.target_true is None or record.messages:
        return []
    return [f"{prefix}. {record.text}" for prefix in inputs.prefixes]


def prompt_after_statement(record: Record, inputs: SuiteInputs) -> str | None:
    """Return the prompt after the true statement of another record: the next subject in alphabetical order."""
    statements = inputs.statements or {}
    others = sorted(subject for subject in statements if subject != record.subject)
    if not others:
        return None
    following = next((s for s in others if s > record.subject), others[0])
    return f"{statements[following]} {record.text}"


def _objects(record: Record) -> tuple[str, ...]:
    assert record.target_true is not None
    return (record.target_new, record.target_true)


PREFIXED = Suite(
    "prefixes",
    "the edit inside a text",
    {
        "ES_prefixed": "p(new) > p(true) on the prompt after ten sampled texts",
        "says_after_statement": "its text begins with the new object on the prompt after another fact",
    },
    _questions,
    _measure,
    needs_prefixes=True,
)
