"""How far an edit moves whole distributions where nothing should change: KL(p_base || p) of the next token.

The most probable token of a neighbor is insensitive: a distribution can move far before it changes.
"""

from __future__ import annotations

from service.datasets.record import Record
from service.evaluation.metrics import Measures, mean
from service.evaluation.suites.question import Answers, NextToken, Question, divergence_of
from service.evaluation.suites.suite import Suite, SuiteInputs


def _questions(record: Record, _inputs: SuiteInputs) -> list[Question]:
    """Return the neighbors, the prompts about subjects that have the new object, and the bare subject."""
    prompts = [n.prompt for n in record.neighbours] + [*record.attribute_prompts, record.subject]
    return [NextToken(p) for p in prompts]


def _measure(record: Record, _inputs: SuiteInputs, answers: Answers, _base: Answers) -> Measures:
    """Return the divergences in nats."""
    neighbors = [divergence_of(answers, n.prompt) for n in record.neighbours]
    return {
        "kl_neighbour": mean(neighbors),
        "kl_neighbour_greatest": max(neighbors, default=None),
        "kl_same_object": mean([divergence_of(answers, p) for p in record.attribute_prompts]),
        "kl_subject": divergence_of(answers, record.subject),
    }


DIVERGENCE = Suite(
    "divergence",
    "change of whole distributions",
    {
        "kl_neighbour": "KL of the next token after the neighbours, nats",
        "kl_neighbour_greatest": "the greatest of a record's neighbours, nats",
        "kl_same_object": "KL after prompts about subjects that have the new object, nats",
        "kl_subject": "KL after the bare subject, nats",
    },
    _questions,
    _measure,
)
