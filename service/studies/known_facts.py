"""Which facts a model knows: only what it says by itself can be lost and brought back (methods B.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput
from service.kit.steps import Steps
from service.kit.text import check_tokens
from service.models.loading import LoadedModel
from service.models.scoring import log_prob_steps
from service.studies.facts import Fact


@dataclass(frozen=True)
class Asked:
    """What came of asking a model for facts."""

    known: list[int]  #: places of those whose object is its greedy answer
    unknown: int  #: how many it answers otherwise
    unasked: int  #: how many it cannot be asked: too long, or the object merges with the prompt

    def left_out(self) -> dict[str, int]:
        return {"not known to the model": self.unknown, "cannot be asked": self.unasked}


def known_steps(model: LoadedModel, facts: Sequence[Fact]) -> Steps[Asked]:
    """Ask for every fact, teacher forced: known are those whose every token is the most probable one."""
    fit = [i for i, fact in enumerate(facts) if _fits(model, fact)]
    pairs = [(facts[i].statement.text, facts[i].object) for i in fit]
    said = yield from log_prob_steps(model, pairs, "ask")
    known = [i for i, (_, greedy) in zip(fit, said, strict=True) if greedy]
    return Asked(known, len(fit) - len(known), len(facts) - len(fit))


def _fits(model: LoadedModel, fact: Fact) -> bool:
    try:
        check_tokens(model.tokenizer.backend_tokenizer, fact.statement.text, fact.object, model.positions)
    except InvalidInput:
        return False
    return True


def run_name(kind: str, *of: Any) -> str:
    """The name under which a run is kept: a digest of all that its figures depend on."""
    text = json.dumps(of, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
