"""The guard: which measurements reject an edit. Pure functions of measurements and limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from service.codebooks.codebook import Ball
from service.editing.candidate import ResolvedEdit, VersionMeasurement
from service.editing.conflicts import ConflictCandidate
from service.editing.probes import ProbeResult, edit_holds, effect_share, name_share, probability_of
from service.editing.side_effects import neighbor_outcomes
from service.models.loading import WeightRef
from service.schemas import Objective


class CheckName(StrEnum):
    """The checks of the guard."""

    EFFICACY = "efficacy"
    PROBABILITY = "probability"
    PARAPHRASE = "paraphrase"
    NEIGHBORHOOD = "neighborhood"
    PERPLEXITY = "perplexity"
    NORM = "norm"
    REGRESSIONS = "regressions"
    SUBJECT = "subject"
    DESCRIPTION = "description"
    CONFLICT = "conflict"
    CAPACITY = "capacity"


#: the checks that a greater strength can turn from failed to passed
EFFECTIVENESS_CHECKS = (CheckName.EFFICACY, CheckName.PROBABILITY, CheckName.PARAPHRASE)


@dataclass(frozen=True)
class Check:
    """The result of one check, with the measured figure and its limit."""

    name: CheckName
    passed: bool
    figure: float
    limit: float


@dataclass(frozen=True)
class GuardResult:
    """The guard's judgement of one edit at one strength, with the measurements before and after."""

    strength: float
    before: VersionMeasurement
    after: VersionMeasurement
    checks: list[Check]
    norm_ratio: dict[WeightRef, float]  #: norm of the edit's own change, as a multiple of the weight's norm
    regressed_edits: list[str]  #: active edits that held before and no longer hold
    objective: Objective = "write"
    conflicts: tuple[ConflictCandidate, ...] = ()
    supersedes: tuple[str, ...] = ()  #: edits in conflict that this one supersedes
    capacity: dict[int, float] = field(default_factory=dict)  #: by layer, the remaining capacity of the key
    has_margin: bool = True  #: the new object leads by the required margin
    ball: Ball | None = None  #: where an entry of a codebook acts

    @property
    def finite(self) -> bool:
        """Whether the edit gives finite weights and a finite perplexity. Without that it is rejected, also when the
        guard is disabled."""
        return all(map(math.isfinite, (*self.norm_ratio.values(), self.after.perplexity)))

    @property
    def passed(self) -> bool:
        """Whether all checks pass."""
        return all(c.passed for c in self.checks)

    @property
    def effective(self) -> bool:
        """Whether the edit has its effect: a greater strength is not needed."""
        return self.has_margin and all(c.passed for c in self.checks if c.name in EFFECTIVENESS_CHECKS)

    @property
    def accepted(self) -> bool:
        """Whether no other strength is tried: all checks pass, and the model generates the new object with the
        required margin."""
        return (
            self.passed
            and self.has_margin
            and (self.after.probe_results[0].new_is_greedy or self.objective == "erase")
        )


def evaluate_guard(
    resolved_edit: ResolvedEdit,
    before: VersionMeasurement,
    after: VersionMeasurement,
    strength: float,
    norms: dict[WeightRef, float],
    required_margin: float = 0.0,
) -> GuardResult:
    """Compare the measurements with the limits of the request's guard.

    `norms`: for each weight, the norm of the edit's change as a multiple of the weight's norm. `required_margin`: the
    lead of the new object, in nats of mean log-probability, below which the edit is strengthened.
    """
    guard, objective = resolved_edit.request.guard, resolved_edit.request.objective
    rewrite = after.probe_results[0]
    checks = [
        _check_efficacy(resolved_edit, before.rewrite_without_superseded or before.probe_results[0], rewrite)
    ]
    if objective != "erase":
        checks.append(_check_at_least(CheckName.PROBABILITY, rewrite.said_probability, guard.min_probability))
    paraphrases = resolved_edit.paraphrase_probes
    if paraphrases:
        results = after.probe_results[1 : resolved_edit.first_neighbor]
        share = sum(map(edit_holds, paraphrases, results)) / len(paraphrases)
        checks.append(_check_at_least(CheckName.PARAPHRASE, share, guard.min_paraphrase))
    if neighbors := [o for o in neighbor_outcomes(resolved_edit, before, after) if o.counts]:
        share = sum(o.is_kept for o in neighbors) / len(neighbors)
        checks.append(_check_at_least(CheckName.NEIGHBORHOOD, share, guard.min_neighborhood))
    if before.name and after.name and (share_of_name := name_share(before.name, after.name)) is not None:
        checks.append(_check_at_least(CheckName.SUBJECT, share_of_name, guard.min_subject))
    change = description_change(before, after)
    if change is not None and guard.max_description_kl is not None:
        checks.append(_check_at_most(CheckName.DESCRIPTION, change, guard.max_description_kl))
    regressed_edits = sorted(before.holding_edits - after.holding_edits)
    checks += [
        _check_at_most(CheckName.PERPLEXITY, after.perplexity / before.perplexity, guard.max_perplexity),
        _check_at_most(CheckName.NORM, max(norms.values(), default=0.0), guard.max_norm),
        _check_at_most(CheckName.REGRESSIONS, len(regressed_edits), guard.max_regressions),
    ]
    has_margin = (
        objective != "write"
        or rewrite.new - rewrite.true >= required_margin
        or resolved_edit.rewrite_probe.same_object
    )
    return GuardResult(
        strength, before, after, checks, norms, regressed_edits, objective, has_margin=has_margin
    )


def description_change(before: VersionMeasurement, after: VersionMeasurement) -> float | None:
    """Return by how much the divergence of the subject's description rises."""
    if before.description_kl is None or after.description_kl is None:
        return None
    return after.description_kl - before.description_kl


def _check_efficacy(resolved_edit: ResolvedEdit, before: ProbeResult, after: ProbeResult) -> Check:
    """Check that the edit does what its objective asks for.

    To write: the new object is said (`ProbeResult.says_new`). To erase or amplify: at least the share `min_effect` of
    the possible change of probability.
    """
    holds, objective = edit_holds(resolved_edit.rewrite_probe, after), resolved_edit.request.objective
    if objective == "write":
        return Check(
            CheckName.EFFICACY, holds, after.said_probability, probability_of(after.decisive_true.lead)
        )
    share, min_effect = effect_share(objective, before, after), resolved_edit.request.guard.min_effect
    return Check(CheckName.EFFICACY, holds and share >= min_effect, share, min_effect)


def _check_at_least(name: CheckName, figure: float, limit: float) -> Check:
    return Check(name, figure >= limit, figure, limit)


def _check_at_most(name: CheckName, figure: float, limit: float) -> Check:
    return Check(name, figure <= limit, figure, limit)  # NaN passes neither


def superseded_by_conflict(resolved_edit: ResolvedEdit, conflicts: Sequence[ConflictCandidate]) -> list[str]:
    """Return the edits in conflict that the edit supersedes, in addition to an older edit of its own fact."""
    return sorted(r.edit for r in conflicts) if resolved_edit.request.on_conflict == "supersede" else []


def add_conflicts_and_capacity(
    resolved_edit: ResolvedEdit,
    guard_result: GuardResult,
    conflicts: Sequence[ConflictCandidate],
    capacity: dict[int, float],
) -> GuardResult:
    """Add the conflicts with active edits, which fail the edit when the request says so, and the remaining capacity
    of its key."""
    guard, checks = resolved_edit.request.guard, list(guard_result.checks)
    if resolved_edit.request.on_conflict == "reject":
        max_probability = max((r.probability for r in conflicts), default=0.0)
        checks.append(Check(CheckName.CONFLICT, not conflicts, max_probability, guard.conflict_threshold))
    if capacity:
        checks.append(_check_at_least(CheckName.CAPACITY, min(capacity.values()), guard.min_capacity))
    superseded_ids = tuple(superseded_by_conflict(resolved_edit, conflicts))
    return replace(
        guard_result, checks=checks, conflicts=tuple(conflicts), supersedes=superseded_ids, capacity=capacity
    )
