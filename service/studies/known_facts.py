"""The facts that a model knows.

Only the effect on an answer that the model gives by itself can be traced (Meng et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import InvalidInput
from service.kit.steps import Phase, Stepper
from service.models.loading import LoadedModel
from service.models.scoring import compute_log_probs
from service.studies.facts import Fact


@dataclass(frozen=True)
class KnownFacts:
    """The outcome of scoring a model on facts."""

    indices: list[int]  #: of the facts whose object is the greedy answer
    unknown: int  #: number of facts with another greedy answer
    unscorable: int  #: number of facts that are too long, or whose object merges with the prompt

    def left_out(self) -> dict[str, int]:
        """Return the number of facts that are left out, by reason."""
        return {"unknown": self.unknown, "unscorable": self.unscorable}


def find_known_facts(model: LoadedModel, facts: Sequence[Fact]) -> Stepper[KnownFacts]:
    """Score every fact teacher-forced. A fact is known if every token of its object is the most probable one."""
    scorable = [i for i, fact in enumerate(facts) if _is_scorable(model, fact)]
    pairs = [(facts[i].statement.text, facts[i].object) for i in scorable]
    answers = yield from compute_log_probs(model, pairs, Phase.PROBE)
    known = [i for i, (_, greedy) in zip(scorable, answers, strict=True) if greedy]
    return KnownFacts(known, len(scorable) - len(known), len(facts) - len(scorable))


def _is_scorable(model: LoadedModel, fact: Fact) -> bool:
    try:
        model.text_encoder.check(fact.statement.text, fact.object)
    except InvalidInput:
        return False
    return True
