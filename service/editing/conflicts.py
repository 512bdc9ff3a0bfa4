"""Edits that say an active edit's relation in other words: one subject, another prompt, and objects that pull against each other.

What an edit writes at its subject speaks on every prompt about the subject, and on those of its own relation most of all. So an
active edit is asked its own question with the new edit alone in place, on the base model: where the new object is then
the more probable one there, the two are about one relation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import cosine_similarity

from service.editing.probes import Question, answers_steps, exp, question_of
from service.engine.versioned_model import Replica
from service.kit.steps import Steps
from service.weights.composition import Association, Piece


@dataclass(frozen=True)
class Rival:
    """An active edit of the same subject with another prompt and another object, beside a new edit."""

    edit: str
    prompt: str
    object: str
    probability: float  #: of the new object on the rival's prompt, with the new edit alone in place
    wanted: float  #: there, of the rival's own object
    true: float  #: there, of what the base model answers
    cosine: (
        float | None
    )  #: of both changes of value at their lowest layer; None where one of them has none there

    def conflicts(self, limit: float) -> bool:
        """Whether the new object is the most probable of the three, and at least as probable as the limit."""
        return self.probability >= max(limit, self.true) and self.probability > self.wanted


def rivals_steps(
    replica: Replica,
    question: Question,
    pieces: Sequence[Piece],
    others: Mapping[str, tuple[Mapping[str, Any], Sequence[Piece]]],
) -> Steps[list[Rival]]:
    """What a new edit does alone on the prompts of others of its subject: their ledger's bodies and pieces, by id.

    Only those with another object; none beside an erasure or with one, since what is not to be said is no other object.
    """
    asked = {edit: question_of(body) for edit, (body, _) in others.items()}
    asked = {
        edit: q
        for edit, q in asked.items()
        if q.new.strip() != question.new.strip() and "erase" not in (q.objective, question.objective)
    }
    if not asked:
        return []
    pairs = [Question(q.prompt, question.new, other) for q in asked.values() for other in (q.new, q.true)]
    alone = replica.composed(pieces)
    answers = yield from replica.standing(alone, answers_steps(replica.base, pairs))
    return [
        Rival(
            edit,
            q.prompt,
            q.new,
            exp(own.new),
            exp(own.true),
            exp(base.true),
            cosine(pieces, others[edit][1]),
        )
        for (edit, q), own, base in zip(asked.items(), answers[::2], answers[1::2], strict=True)
    ]


def cosine(one: Sequence[Piece], other: Sequence[Piece]) -> float | None:
    """Of the changes of value of two edits at their lowest layer, where that is one and both are associations."""
    a, b = (min(pieces, key=lambda p: p.layer) for pieces in (one, other))
    if not (isinstance(a, Association) and isinstance(b, Association) and a.layer == b.layer):
        return None
    return float(cosine_similarity(a.value.double().cpu(), b.value.double().cpu(), dim=0))
