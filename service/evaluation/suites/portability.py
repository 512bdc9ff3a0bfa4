"""What follows from an edit: facts of two steps, reversed facts, other names of the subject, and facts that stay.

The questions come from the records: MQuAKE (Zhong et al. 2023), RippleEdits (Cohen et al. 2024), KnowEdit (Zhang et
al. 2024), or a user's own. What the base model answers to the same question about the unedited fact is the ceiling: a
model that cannot put two facts together before an edit cannot do so after it.
"""

from __future__ import annotations

from service.datasets.record import PORTABILITY_KINDS, PortabilityProbe, Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, FreeText, Question, TextAnswer, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs, share

DESCRIPTIONS = {
    "hop": "questions that need the edited fact and another one",
    "reverse": "the question from the new object to the subject",
    "alias": "the fact about another name of the subject",
    "kept": "other facts that the edit leaves true",
    "logical": "facts that follow from the relation",
}


def _questions(record: Record, _inputs: SuiteInputs) -> list[Question]:
    """Return every prompt of the record's probes."""
    return [FreeText(p) for probe in record.portability for p in probe.prompts]


def _measure(record: Record, _inputs: SuiteInputs, answers: Answers, base: Answers) -> Measures:
    """Return for each kind the share of questions that are answered rightly, and that of the base model's own."""
    measures: Measures = {}
    for kind in PORTABILITY_KINDS:
        probes = [p for p in record.portability if p.kind == kind]
        measures[f"portability_{kind}"] = share([_hits(p, p.targets, answers) for p in probes])
        with_own = [p for p in probes if p.targets_before]
        measures[f"portability_{kind}_ceiling"] = share([_hits(p, p.targets_before, base) for p in with_own])
    return measures


def _hits(probe: PortabilityProbe, targets: tuple[str, ...], answers: Answers) -> bool:
    """Whether one of the wordings is answered with one of the objects, as MQuAKE counts it."""
    return any(_is_right(text_of(answers, prompt), targets) for prompt in probe.prompts)


def _is_right(answer: TextAnswer, targets: tuple[str, ...]) -> bool:
    return any(answer.mentions(target) for target in targets)


PORTABILITY = Suite(
    "portability",
    "what follows from the edit",
    {
        f"portability_{kind}{suffix}": words
        for kind, description in DESCRIPTIONS.items()
        for suffix, words in (
            ("", description),
            ("_ceiling", f"the same, answered by the base model before the edit: {description}"),
        )
    },
    _questions,
    _measure,
)
