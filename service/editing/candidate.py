"""What a version with some edits in it would be, measured before anything is written, and what the guard says of it.

Several edits may be tried in one version: each is asked its own questions and judged by its own guard; the perplexity and the edits
that cease to hold are the version's, and every one of them answers for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from service.editing.conflicts import ConflictCandidate, find_conflict_candidates
from service.editing.context import EditorContext
from service.editing.edit_spec import EditFactors
from service.editing.probes import (
    Probe,
    ProbeResult,
    edit_holds,
    effect_share,
    neighbor_preserved,
    probability_of,
    probe_of_entry,
    run_probes,
)
from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import fact_key
from service.methods.parameters import Parameters
from service.models.loading import LoadedModel, WeightRef
from service.models.scoring import compute_perplexity
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.schemas import EditRequest, Objective, Sampling
from service.weights.capacity import measure_capacities
from service.weights.composition import WeightDelta, compose, norm_ratio
from service.weights.factors import Association, EditUpdate

MAX_REGRESSION_PROBES = 64  # active edits that an edit looks at for damage: those of its subject, then those whose keys are nearest
PREVIEW_TOKENS = 8  # tokens of what the model says, shown to people


@dataclass(frozen=True)
class ResolvedEdit:
    """An edit's request, resolved."""

    request: EditRequest
    parameters: Parameters
    rewrite_probe: Probe
    paraphrase_probes: list[Probe]
    neighborhood_probes: list[Probe]

    @property
    def probes(self) -> list[Probe]:
        return [self.rewrite_probe, *self.paraphrase_probes, *self.neighborhood_probes]

    @property
    def method(self) -> str:
        return self.request.method or "rome"

    @property
    def fact(self) -> str:
        return fact_key(self.request.subject, self.request.prompt)


@dataclass(frozen=True)
class CandidateEdit:
    """An edit that has not landed: what is asked for, and what was found on the base model."""

    resolved_edit: ResolvedEdit
    factors: EditFactors


@dataclass(frozen=True)
class VersionMeasurement:
    """Answers to a plan's questions, what the model says, the perplexity, and which watched edits hold."""

    probe_results: list[ProbeResult]
    preview_text: str
    perplexity: float
    holding_edits: set[str]
    rewrite_without_superseded: ProbeResult | None = (
        None  #: to the plan's own question, where it differs when what the edit supersedes is left out
    )


@dataclass(frozen=True)
class Baseline:
    """A version that edits are tried on: who stays active beside them, whom to watch, and how things are before."""

    version: int
    active_updates: list[EditUpdate]
    weight_deltas: dict[WeightRef, WeightDelta]  #: these, as changes of their weights
    regression_probes: dict[str, Probe]
    measurements: list[VersionMeasurement]  #: for each draft
    conflicts: list[
        list[ConflictCandidate]
    ]  #: of each draft, with active edits that say its relation in other words
    capacity: list[dict[int, float]]  #: by layer, what the others leave of each draft's key

    def strength_schedule(self, resolved_edit: ResolvedEdit, model: LoadedModel) -> StrengthSchedule:
        """What is tried in turn for an edit beside the others."""
        active = len({p.edit for p in self.active_updates}) + len(self.measurements)
        return strength_schedule(
            resolved_edit.parameters, resolved_edit.parameters.strengths, active, model.intermediate_size
        )


@dataclass(frozen=True)
class Check:
    """One rule of the guard, with its figure and its limit."""

    name: str
    passed: bool
    figure: float
    limit: float


@dataclass(frozen=True)
class GuardResult:
    """What the version with the edit in it would be."""

    strength: float
    before: VersionMeasurement
    after: VersionMeasurement
    checks: list[Check]
    norm_ratio: dict[WeightRef, float]
    regressed_edits: list[str]
    objective: Objective = "write"
    conflicts: tuple[ConflictCandidate, ...] = ()
    supersedes: tuple[str, ...] = ()
    capacity: dict[int, float] = field(default_factory=dict)
    has_margin: bool = True  #: by the margin that the recipe asks for

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    @property
    def effective(self) -> bool:
        effectiveness_checks = ("efficacy", "probability", "paraphrase")
        return self.has_margin and all(c.passed for c in self.checks if c.name in effectiveness_checks)

    @property
    def accepted(self) -> bool:
        """Whether the model says the new object, and nothing speaks against it: no other strength is wanted."""
        return (
            self.passed
            and self.has_margin
            and (self.after.probe_results[0].new_is_greedy or self.objective == "erase")
        )


def measure_baseline(
    replica: VersionedModel, context: EditorContext, candidates: Sequence[CandidateEdit], version: int
) -> Stepper[Baseline]:
    """Measure a version before these edits.

    An older edit of the same fact is superseded, and so is one in conflict where that is asked for: it is left out, as it will
    be at the new version.
    """
    facts = {d.resolved_edit.fact for d in candidates}
    bodies = {
        edit: body
        for edit, body in replica.ledger.active_at(version)
        if fact_key(str(body["subject"]), str(body["prompt"])) not in facts
    }
    active_updates = replica.active_updates(version)
    conflicts = yield from _find_conflicts(replica, candidates, bodies, active_updates)
    superseded_ids = {
        e
        for d, found in zip(candidates, conflicts, strict=True)
        for e in superseded_by_conflict(d.resolved_edit, found)
    }
    bodies = {edit: body for edit, body in bodies.items() if edit not in superseded_ids}
    active = {edit: active_updates[edit] for edit in bodies}
    regression_probes = {edit: probe_of_entry(bodies[edit]) for edit in _nearest_edits(active, candidates)}
    resolved_edits = [d.resolved_edit for d in candidates]
    weights = replica.weights(version)
    measurements = yield from replica.step_with_weights(
        weights, measure_version(replica, context, resolved_edits, regression_probes, version)
    )
    other_updates = [a for group in active.values() for a in group]
    if len(active) < len(active_updates) and any(p.request.objective != "write" for p in resolved_edits):
        rewrite_probing = run_probes(replica.base, [p.rewrite_probe for p in resolved_edits])
        bare_results = yield from replica.step_with_weights(
            replica.compose_weights(other_updates), rewrite_probing
        )
        measurements = [
            replace(m, rewrite_without_superseded=answer)
            for m, answer in zip(measurements, bare_results, strict=True)
        ]
    capacity = yield from measure_capacities([d.factors.updates for d in candidates], other_updates)
    yield Progress(Phase.BASELINE, 1, 1)
    return Baseline(
        version, other_updates, compose(other_updates), regression_probes, measurements, conflicts, capacity
    )


def _find_conflicts(
    replica: VersionedModel,
    candidates: Sequence[CandidateEdit],
    bodies: Mapping[str, Mapping[str, Any]],
    updates: Mapping[str, list[EditUpdate]],
) -> Stepper[list[list[ConflictCandidate]]]:
    """The conflicts of each draft with active edits of its subject."""
    conflicts = []
    for candidate in candidates:
        new_updates = candidate.factors.updates
        others = {
            e: (body, updates[e])
            for e, body in bodies.items()
            if updates[e][0].subject == new_updates[0].subject
        }
        candidates_found = yield from find_conflict_candidates(
            replica, candidate.resolved_edit.rewrite_probe, new_updates, others
        )
        limit = candidate.resolved_edit.request.guard.conflict_threshold
        conflicts.append([r for r in candidates_found if r.is_conflict(limit)])
    return conflicts


def _nearest_edits(active: dict[str, list[EditUpdate]], candidates: Sequence[CandidateEdit]) -> list[str]:
    """The active edits that some draft is nearest to: of its subject first, then by the overlap of their keys. A piece without a
    key is as near as any: the newest of those."""
    keyed = {e: a for e, group in active.items() for a in group[:1] if isinstance(a, Association)}
    keyless = [e for e in active if e not in keyed]
    keys = torch.stack([a.key for a in keyed.values()]) if keyed else torch.empty(0, 0)
    selected: dict[str, None] = {}
    for candidate in candidates:
        first_update = candidate.factors.updates[0]
        same_subject = [e for e, group in active.items() if group[0].subject == first_update.subject]
        nearest_keys: list[str] = []
        if keyed and isinstance(first_update, Association):
            overlap = (keys @ first_update.direction).abs().sort(descending=True, stable=True).indices
            nearest_keys = [list(keyed)[i] for i in overlap.tolist()]
        order = dict.fromkeys([*same_subject, *nearest_keys, *reversed(keyless), *active])
        selected |= dict.fromkeys(list(order)[:MAX_REGRESSION_PROBES])
    return list(selected)


def evaluate_candidates(
    replica: VersionedModel,
    context: EditorContext,
    candidates: Sequence[CandidateEdit],
    baseline: Baseline,
    strengths: Sequence[float],
) -> Stepper[list[GuardResult]]:
    """Compose the version with these edits in it, each with its strength, put it in place, measure, and judge each."""
    scaled_updates = [
        [p.scaled(s) for p in d.factors.updates] for d, s in zip(candidates, strengths, strict=True)
    ]
    all_updates = baseline.active_updates + [a for group in scaled_updates for a in group]
    weights = replica.compose_weights(all_updates)
    yield Progress(Phase.COMPOSE, 1, 1)
    resolved_edits = [d.resolved_edit for d in candidates]
    after = yield from replica.step_with_weights(
        weights, measure_version(replica, context, resolved_edits, baseline.regression_probes)
    )
    guard_results: list[GuardResult] = []
    for i, (candidate, group) in enumerate(zip(candidates, scaled_updates, strict=True)):
        norms = _norm_ratios(replica, baseline, group)
        required_margin = baseline.strength_schedule(candidate.resolved_edit, replica.base).required_margin(
            strengths[i]
        )
        guard_result = evaluate_guard(
            candidate.resolved_edit, baseline.measurements[i], after[i], strengths[i], norms, required_margin
        )
        guard_results.append(
            add_conflicts_and_capacity(
                candidate.resolved_edit, guard_result, baseline.conflicts[i], baseline.capacity[i]
            )
        )
        if len(candidates) > 1:
            yield Progress(Phase.GUARD, len(guard_results), len(candidates))
    return guard_results


def measure_version(
    replica: VersionedModel,
    context: EditorContext,
    resolved_edits: Sequence[ResolvedEdit],
    regression_probes: dict[str, Probe],
    version: int | None = None,
) -> Stepper[list[VersionMeasurement]]:
    """Ask the model, as it stands, everything that the guards of these edits want to know.

    A `version` that has landed has its perplexity measured once.
    """
    probes = [q for plan in resolved_edits for q in plan.probes]
    results = iter((yield from run_probes(replica.base, [*probes, *regression_probes.values()])))
    results_by_edit = [[next(results) for _ in plan.probes] for plan in resolved_edits]
    holding = {edit for edit, question in regression_probes.items() if edit_holds(question, next(results))}
    preview_texts = yield from generate_greedy(
        replica.base, [plan.rewrite_probe.prompt for plan in resolved_edits]
    )
    perplexity = context.perplexities.get(version) if version is not None else None
    if perplexity is None:
        perplexity = yield from compute_perplexity(replica.base, context.reference_texts)
    if version is not None:
        context.cache_perplexity(version, perplexity)
    return [
        VersionMeasurement(a, s, perplexity, holding)
        for a, s in zip(results_by_edit, preview_texts, strict=True)
    ]


def generate_greedy(
    model: LoadedModel, prompts: Sequence[str], length: int = PREVIEW_TOKENS
) -> Stepper[list[str]]:
    """The greedy continuations of some prompts, at most `length` tokens each, side by side."""
    greedy = Sampling(max_new_tokens=length, temperature=0)
    rows: list[DecodingSequence | None] = []
    for prompt in prompts:
        try:
            rows.append(new_sequence(model, prompt, greedy))
        except InvalidInput:  # it fills the model's positions: there is no room for an answer
            rows.append(None)
    batch = DecodingBatch(model, [r for r in rows if r is not None])
    step = 0
    while len(batch):
        batch.step()
        step += 1
        yield Progress(Phase.ANSWER, step, length)
    return [r.text if r is not None else "" for r in rows]


def _norm_ratios(
    replica: VersionedModel, baseline: Baseline, updates: Sequence[EditUpdate]
) -> dict[WeightRef, float]:
    """How far an edit moves each of its weights from where the others have it, as a multiple of the weight's norm.

    Its own share and not the sum: many sound edits together move a weight further than one wild one.
    """
    touched_weights = {p.weight_ref for p in updates}
    after = compose(p for p in [*baseline.active_updates, *updates] if p.weight_ref in touched_weights)
    before = baseline.weight_deltas
    own_deltas = {x: after[x].minus(before[x]) if x in before else after[x] for x in touched_weights}
    return {x: norm_ratio(replica.base.parameter(x).data, change) for x, change in own_deltas.items()}


def evaluate_guard(
    resolved_edit: ResolvedEdit,
    before: VersionMeasurement,
    after: VersionMeasurement,
    strength: float,
    norms: dict[WeightRef, float],
    required_margin: float = 0.0,
) -> GuardResult:
    """Hold a trial against the guard's limits. It leads when the new object is ahead by `lead`."""
    guard, objective = resolved_edit.request.guard, resolved_edit.request.objective
    checks = [
        _check_efficacy(
            resolved_edit,
            before.rewrite_without_superseded or before.probe_results[0],
            after.probe_results[0],
        )
    ]
    if objective != "erase":
        checks.append(
            _check_at_least("probability", probability_of(after.probe_results[0].new), guard.min_probability)
        )
    first_neighbor = 1 + len(resolved_edit.paraphrase_probes)
    probe_results = list(zip(resolved_edit.probes, before.probe_results, after.probe_results, strict=True))
    if resolved_edit.paraphrase_probes:
        share = sum(edit_holds(q, now) for q, _, now in probe_results[1:first_neighbor]) / len(
            resolved_edit.paraphrase_probes
        )
        checks.append(_check_at_least("paraphrase", share, guard.min_paraphrase))
    if neighbors_before := [
        (q, now) for q, was, now in probe_results[first_neighbor:] if neighbor_preserved(q, was)
    ]:
        share = sum(neighbor_preserved(q, now) for q, now in neighbors_before) / len(neighbors_before)
        checks.append(_check_at_least("neighborhood", share, guard.min_neighborhood))
    regressed_edits = sorted(before.holding_edits - after.holding_edits)
    checks += [
        _check_at_most("perplexity", after.perplexity / before.perplexity, guard.max_perplexity),
        _check_at_most("norm", max(norms.values()), guard.max_norm),
        _check_at_most("regressions", len(regressed_edits), guard.max_regressions),
    ]
    rewrite = after.probe_results[0]
    has_margin = (
        objective != "write"
        or rewrite.new - rewrite.true >= required_margin
        or resolved_edit.rewrite_probe.same_object
    )
    return GuardResult(
        strength, before, after, checks, norms, regressed_edits, objective, has_margin=has_margin
    )


def _check_efficacy(resolved_edit: ResolvedEdit, before: ProbeResult, after: ProbeResult) -> Check:
    """Whether an edit does what it is for. Its figure: p(new), to be above p(true); else the share of what was possible."""
    holds_now, objective = edit_holds(resolved_edit.rewrite_probe, after), resolved_edit.request.objective
    if objective == "write":
        return Check("efficacy", holds_now, probability_of(after.new), probability_of(after.true))
    share, min_effect = effect_share(objective, before, after), resolved_edit.request.guard.min_effect
    return Check("efficacy", holds_now and share >= min_effect, share, min_effect)


def _check_at_least(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure >= limit, figure, limit)


def _check_at_most(name: str, figure: float, limit: float) -> Check:
    return Check(name, figure <= limit, figure, limit)  # NaN passes neither


def superseded_by_conflict(resolved_edit: ResolvedEdit, conflicts: Sequence[ConflictCandidate]) -> list[str]:
    """The edits that an edit names as superseded, beside older ones of its own fact."""
    return sorted(r.edit for r in conflicts) if resolved_edit.request.on_conflict == "supersede" else []


def add_conflicts_and_capacity(
    resolved_edit: ResolvedEdit,
    guard_result: GuardResult,
    conflicts: Sequence[ConflictCandidate],
    capacity: dict[int, float],
) -> GuardResult:
    """A trial with what active edits mean for it: conflicts, which fail it where that is asked for, and the room that they leave."""
    guard, checks = resolved_edit.request.guard, list(guard_result.checks)
    if resolved_edit.request.on_conflict == "reject":
        max_probability = max((r.probability for r in conflicts), default=0.0)
        checks.append(Check("conflict", not conflicts, max_probability, guard.conflict_threshold))
    if capacity:
        checks.append(_check_at_least("capacity", min(capacity.values()), guard.min_capacity))
    superseded_ids = tuple(superseded_by_conflict(resolved_edit, conflicts))
    return replace(
        guard_result, checks=checks, conflicts=tuple(conflicts), supersedes=superseded_ids, capacity=capacity
    )
