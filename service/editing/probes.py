"""What a model is asked of an edit, and what an answer is worth: whether the edit holds, whether a neighbour keeps its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from service.kit.steps import Steps
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.models.scoring import score_steps
from service.schemas import Objective
from service.scores.hase_scores import erasure_share, rewrite_share


@dataclass(frozen=True)
class Question:
    """A prompt with the new object and the true one. To erase or amplify, the new object is the true one of the edit."""

    prompt: str
    new: str
    true: str
    objective: Objective = "write"

    @property
    def one_object(self) -> bool:
        """Whether the new object is the true one as well, so that neither can lead."""
        return self.new.strip() == self.true.strip()


@dataclass(frozen=True)
class Answer:
    """Mean log-probability of both objects, and whether each is the greedy continuation."""

    new: float
    true: float
    says_new: bool
    says_true: bool
    tokens: int = 1  #: of the new object

    @property
    def prefers_new(self) -> bool:
        return self.new > self.true

    def probabilities(self) -> dict[str, float]:
        """exp of the mean log-probability over the object's tokens (methods E.1)."""
        return {"new": exp(self.new), "true": exp(self.true)}

    @property
    def joint(self) -> float:
        """Probability of the whole new object."""
        return exp(self.new * self.tokens)


def holds(question: Question, answer: Answer) -> bool:
    """Whether the new object is the more probable one, or is said where it is the true one as well; an erased one is not said."""
    if question.objective == "erase":
        return not answer.says_true
    return answer.prefers_new or (question.one_object and answer.says_new)


def keeps(question: Question, answer: Answer) -> bool:
    """Whether a neighbour has its answer: not the new object; where none is written, it is said."""
    return not answer.prefers_new if question.objective == "write" else answer.says_true


def effect(objective: Objective, before: Answer, after: Answer) -> float:
    """How much of what was possible an erasure or an amplification did (Hase et al. 2023; methods F.2)."""
    share = erasure_share if objective == "erase" else rewrite_share
    return share(before.joint, after.joint)


def question_of(body: Mapping[str, Any]) -> Question:
    """What an entry of the ledger says that the model is to say."""
    true = str(body.get("resolved_true") or body.get("target_true") or "?")
    prompt = fill(str(body["prompt"]), str(body["subject"])).text
    objective: Objective = body.get("objective", "write")
    return Question(prompt, str(body["target_new"]) if objective == "write" else true, true, objective)


def answers_steps(model: LoadedModel, questions: Sequence[Question]) -> Steps[list[Answer]]:
    """How the model, as it stands, answers some questions."""
    scores = yield from score_steps(
        model, [(q.prompt, target) for q in questions for target in (q.new, q.true)]
    )
    return [
        Answer(new.log_p, true.log_p, new.says, true.says, new.tokens)
        for new, true in zip(scores[::2], scores[1::2], strict=True)
    ]


def exp(log_p: float) -> float:
    """Of a log-probability."""
    return float(torch.tensor(log_p, dtype=torch.float64).exp())
