"""Probes: prompts whose new and true object are scored to measure an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from service.errors import InvalidInput
from service.kit.separator import Separator
from service.kit.stated_fact import StatedFact
from service.kit.steps import Stepper
from service.models.loading import LoadedModel
from service.models.score import DecisiveScore, TargetScore, decisive_scores
from service.models.scoring import score_targets
from service.schemas import Objective
from service.scores.hase_scores import erasure_share, rewrite_share

NO_OBJECT = "?"  #: the true object where the base model gives no answer

#: where a probe comes from: the request, the templates for all relations, the table of facts, the subjects of active
#: edits, the base model's enumeration of like subjects, or other relations of the same subject in the table
ProbeSource = Literal["request", "template", "facts", "edits", "model", "relation"]
#: probability of the subject's name before an edit below which its change says nothing
MIN_NAME_PROBABILITY = 0.05


@dataclass(frozen=True)
class Probe:
    """A prompt with a new and a true object. To erase or amplify, both are the true object of the edit."""

    prompt: str
    new: str
    true: str
    objective: Objective = "write"
    separator: Separator | None = None  #: between the prompt and either object; None: the usual one
    subject: str | None = None  #: of a neighbour that the service found
    source: ProbeSource = "request"

    @property
    def same_object(self) -> bool:
        """Whether both objects are the same, so that neither can lead."""
        return self.new.strip() == self.true.strip()


@dataclass(frozen=True)
class ProbeResult:
    """The scores of both objects.

    The guard decides by `says_new`, `prefers_new` and `said_probability`. The mean per token is what the scores of the
    papers are made of.
    """

    new: float  #: mean log-probability per token
    true: float
    new_is_greedy: bool  #: it is the greedy continuation
    true_is_greedy: bool
    decisive_new: DecisiveScore
    decisive_true: DecisiveScore
    new_tokens: int = 1  #: of the new object

    @classmethod
    def from_scores(cls, new: TargetScore, true: TargetScore) -> ProbeResult:
        """Build the result from the scores of the new and of the true object."""
        return cls(
            new.log_p, true.log_p, new.is_greedy, true.is_greedy, *decisive_scores(new, true), new.num_tokens
        )

    @property
    def prefers_new(self) -> bool:
        """Whether the new object is more probable than the true one at the first token in which they differ."""
        return self.decisive_new.lead > self.decisive_true.lead

    @property
    def says_new(self) -> bool:
        """Whether the probability that the model says the new object is above that of the true one, taken up to the
        first token in which they differ."""
        return self.decisive_new.said > self.decisive_true.lead

    @property
    def said_probability(self) -> float:
        """The probability that the model says the new object (`DecisiveScore.said`)."""
        return probability_of(self.decisive_new.said)

    def probabilities(self) -> dict[str, float]:
        """Return exp of the mean log-probability per token of each object."""
        return {"new": probability_of(self.new), "true": probability_of(self.true)}

    @property
    def joint_probability(self) -> float:
        """The probability of the whole new object."""
        return probability_of(self.new * self.new_tokens)


def name_share(before: ProbeResult, after: ProbeResult) -> float | None:
    """Return the probability of the subject's name as a share of that before the edit; None where the model did not
    name the subject before."""
    named = before.joint_probability
    return after.joint_probability / named if named >= MIN_NAME_PROBABILITY else None


def edit_holds(probe: Probe, result: ProbeResult) -> bool:
    """Whether the edit holds: the new object is said rather than the true one, or the greedy one when both are the
    same. An erased object must not be the greedy continuation."""
    if probe.objective == "erase":
        return not result.true_is_greedy
    return result.says_new or (probe.same_object and result.new_is_greedy)


def neighbor_preserved(probe: Probe, result: ProbeResult) -> bool:
    """Whether a neighbour keeps its answer: the true object is at least as probable as the new one. To erase or
    amplify, it must be the greedy continuation."""
    return not result.prefers_new if probe.objective == "write" else result.true_is_greedy


def effect_share(objective: Objective, before: ProbeResult, after: ProbeResult) -> float:
    """Return the share of the possible change of probability that an erasure or an amplification reached (Hase et al.
    2023)."""
    share = erasure_share if objective == "erase" else rewrite_share
    return share(before.joint_probability, after.joint_probability)


def probe_fits(model: LoadedModel, probe: Probe) -> bool:
    """Whether both objects can be scored after the prompt."""
    try:
        for target in (probe.new, probe.true):
            model.text_encoder.check(probe.prompt, target, probe.separator)
    except InvalidInput:
        return False
    return True


def probe_of_entry(body: Mapping[str, Any]) -> Probe:
    """Return the rewrite probe of a ledger entry."""
    true = str(body.get("resolved_true") or body.get("target_true") or NO_OBJECT)
    prompt = StatedFact.from_fields(body).statement().text
    objective: Objective = body.get("objective", "write")
    new = str(body["target_new"]) if objective == "write" else true
    return Probe(prompt, new, true, objective, body.get("resolved_separator"))


def run_probes(model: LoadedModel, probes: Sequence[Probe]) -> Stepper[list[ProbeResult]]:
    """Score probes on the model with its current weights."""
    scores = yield from score_targets(
        model,
        [(q.prompt, target) for q in probes for target in (q.new, q.true)],
        separators=[q.separator for q in probes for _ in range(2)],
    )
    return [ProbeResult.from_scores(new, true) for new, true in zip(scores[::2], scores[1::2], strict=True)]


def probability_of(log_p: float) -> float:
    """Return the probability of a log-probability, computed in fp64."""
    return float(torch.tensor(log_p, dtype=torch.float64).exp())
