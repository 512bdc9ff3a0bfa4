"""Which facts a model knows: only what it says by itself can be lost and brought back (methods B.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput
from service.kit.steps import Phase, Stepper
from service.kit.text import check_tokens
from service.models.loading import LoadedModel
from service.models.scoring import compute_log_probs
from service.studies.facts import Fact


@dataclass(frozen=True)
class KnownFacts:
    """What came of asking a model for facts."""

    indices: list[int]  #: places of those whose object is its greedy answer
    unknown: int  #: how many it answers otherwise
    unscorable: int  #: how many it cannot be asked: too long, or the object merges with the prompt

    def left_out(self) -> dict[str, int]:
        return {"not known to the model": self.unknown, "cannot be asked": self.unscorable}


def find_known_facts(model: LoadedModel, facts: Sequence[Fact]) -> Stepper[KnownFacts]:
    """Ask for every fact, teacher forced: known are those whose every token is the most probable one."""
    scorable = [i for i, fact in enumerate(facts) if _is_scorable(model, fact)]
    pairs = [(facts[i].statement.text, facts[i].object) for i in scorable]
    answers = yield from compute_log_probs(model, pairs, Phase.PROBE)
    known = [i for i, (_, greedy) in zip(scorable, answers, strict=True) if greedy]
    return KnownFacts(known, len(scorable) - len(known), len(facts) - len(scorable))


def _is_scorable(model: LoadedModel, fact: Fact) -> bool:
    try:
        check_tokens(model.tokenizer.backend_tokenizer, fact.statement.text, fact.object, model.max_positions)
    except InvalidInput:
        return False
    return True


def run_artifact_name(kind: str, *inputs: Any) -> str:
    """The name under which a run is kept: a digest of all that its figures depend on."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
