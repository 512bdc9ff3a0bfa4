"""Measurements of a version: of the version before an edit (the baseline), and of the version that contains
candidates.

Nothing is written. Several candidates may be measured in one version. Each has its own probes and its own guard. The
perplexity and the regressions are those of the version, and count for every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from service.codebooks.codebook import Ball, distances_between
from service.editing.candidate import CandidateEdit, ResolvedEdit, VersionMeasurement
from service.editing.conflicts import ConflictCandidate, find_conflict_candidates
from service.editing.context import EditorContext
from service.editing.description import Description, describe_subjects, measure_descriptions
from service.editing.greedy_text import GreedyText, generate_greedy
from service.editing.guard import (
    GuardResult,
    add_conflicts_and_capacity,
    evaluate_guard,
    superseded_by_conflict,
)
from service.editing.probes import Probe, edit_holds, probe_of_entry, run_probes
from service.engine.versioned_model import VersionedModel
from service.errors import AlreadySays
from service.kit.stated_fact import StatedFact
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import normalize_whitespace
from service.models.loading import LoadedModel, WeightRef
from service.models.scoring import compute_perplexity
from service.patches.codebook_patch import CodebookPatch
from service.patches.patch import PatchSet
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.weights.capacity import measure_capacities
from service.weights.composition import is_change_in_range, is_in_range
from service.weights.factors import Association, CodebookEntry, EditUpdate, WeightUpdate, weight_updates
from service.weights.own_change import OwnChanges

#: active edits that are probed for each candidate: those of its subject, then those with the nearest keys
MAX_REGRESSION_PROBES = 64


@dataclass(frozen=True)
class Baseline:
    """The version before the candidates: the edits that stay active, the regression probes and the measurements."""

    version: int
    active_updates: list[EditUpdate]
    own_changes: OwnChanges  #: the changes that the candidates add to `active_updates`
    regression_probes: dict[str, Probe]
    measurements: list[VersionMeasurement]  #: one for each candidate
    conflicts: list[
        list[ConflictCandidate]
    ]  #: of each candidate, with active edits of the same relation in other words
    capacity: list[dict[int, float]]  #: of each candidate's key, by layer
    descriptions: list[Description | None]  #: of each candidate's subject, by the base model

    def strength_schedule(self, resolved_edit: ResolvedEdit, model: LoadedModel) -> StrengthSchedule:
        """Return the strengths that are tried for an edit next to the other active edits."""
        active = len({p.edit for p in self.active_updates}) + len(self.measurements)
        return strength_schedule(
            resolved_edit.parameters, resolved_edit.parameters.strengths, active, model.intermediate_size
        )


def measure_baseline(
    replica: VersionedModel, context: EditorContext, candidates: Sequence[CandidateEdit], version: int
) -> Stepper[Baseline]:
    """Measure a version before the candidates.

    Edits that a candidate supersedes are left out, as at the new version: an older edit of the same fact, and one in
    conflict when the request says so.
    """
    facts = {d.resolved_edit.fact for d in candidates}
    bodies = {
        edit: body
        for edit, body in replica.ledger.active_at(version)
        if StatedFact.from_fields(body).key not in facts
    }
    active_updates = yield from replica.active_updates_in_steps(version)
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
    patch = yield from replica.patch_in_steps(version)
    measurements = yield from replica.step_with_patch(
        patch, measure_version(replica, context, resolved_edits, regression_probes, version)
    )
    other_updates = [a for group in active.values() for a in group]
    if len(active) < len(active_updates) and any(p.request.objective != "write" for p in resolved_edits):
        rewrite_probing = run_probes(replica.base, [p.rewrite_probe for p in resolved_edits])
        patch = yield from replica.compose_patch_in_steps(other_updates)
        bare_results = yield from replica.step_with_patch(patch, rewrite_probing)
        measurements = [
            replace(m, rewrite_without_superseded=answer)
            for m, answer in zip(measurements, bare_results, strict=True)
        ]
    descriptions = yield from describe_subjects(replica.base, [p.request.subject for p in resolved_edits])
    measurements = yield from _with_descriptions(
        replica, (yield from replica.patch_in_steps(version)), descriptions, measurements
    )
    new_updates = [d.factors.updates for d in candidates]
    capacity = yield from measure_capacities(new_updates, other_updates)
    own_changes = yield from OwnChanges.build(new_updates, other_updates)
    yield Progress(Phase.BASELINE, 1, 1)
    return Baseline(
        version,
        other_updates,
        own_changes,
        regression_probes,
        measurements,
        conflicts,
        capacity,
        descriptions,
    )


def _with_descriptions(
    replica: VersionedModel,
    patch: PatchSet,
    descriptions: Sequence[Description | None],
    measurements: Sequence[VersionMeasurement],
) -> Stepper[list[VersionMeasurement]]:
    """Add to the measurements of a version how far it changes the descriptions of the subjects."""
    divergences = yield from measure_descriptions(replica, patch, descriptions)
    return [replace(m, description_kl=kl) for m, kl in zip(measurements, divergences, strict=True)]


def require_other_answer(replica: VersionedModel, resolved_edit: ResolvedEdit, version: int) -> Stepper[None]:
    """Raise AlreadySays if the greedy answer already is the object that an edit writes, on the base model and at a
    version.

    An answer that is due to other edits is no reason to refuse an edit: they can be reverted. For the same reason an
    edit of a subject that has active edits is always accepted.
    """
    request, probe = resolved_edit.request, resolved_edit.rewrite_probe
    subject = normalize_whitespace(request.subject)
    if (
        request.objective != "write"
        or not request.guard.enabled
        or any(
            normalize_whitespace(str(b["subject"])) == subject for _, b in replica.ledger.active_at(version)
        )
    ):
        return
    (result,) = yield from run_probes(replica.base, [probe])
    if not result.new_is_greedy:
        return
    patch = yield from replica.patch_in_steps(version)
    (result,) = yield from replica.step_with_patch(patch, run_probes(replica.base, [probe]))
    if result.new_is_greedy:
        raise AlreadySays(
            f"the model already answers {probe.new!r}, so that there is nothing to change: to make the answer more "
            "probable, use the objective `amplify`; to write it all the same, disable the guard.",
            "target_new",
        )


def _find_conflicts(
    replica: VersionedModel,
    candidates: Sequence[CandidateEdit],
    bodies: Mapping[str, Mapping[str, Any]],
    updates: Mapping[str, list[EditUpdate]],
) -> Stepper[list[list[ConflictCandidate]]]:
    """Return the conflicts of each candidate with active edits of its subject."""
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
    """Return the active edits to probe for regressions: for each candidate those of its subject, then those whose
    keys overlap most with its direction or, in a codebook, are nearest to its key, then the newest edits without a
    key."""
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
        elif isinstance(first_update, CodebookEntry):
            nearest_keys = _nearest_entries(active, first_update)
        order = dict.fromkeys([*same_subject, *nearest_keys, *reversed(keyless), *active])
        selected |= dict.fromkeys(list(order)[:MAX_REGRESSION_PROBES])
    return list(selected)


def _nearest_entries(active: dict[str, list[EditUpdate]], entry: CodebookEntry) -> list[str]:
    """Return the active edits with an entry in the codebook of an entry, the nearest ones first: theirs are the balls
    that it can make smaller."""
    others = {e: a for e, group in active.items() for a in group[:1] if isinstance(a, CodebookEntry)}
    keys = {e: a.key for e, a in others.items() if a.layer == entry.layer}
    if not keys:
        return []
    distances = distances_between(entry.key[None], torch.stack(list(keys.values())))[0]
    return [list(keys)[i] for i in distances.sort(stable=True).indices.tolist()]


def evaluate_candidates(
    replica: VersionedModel,
    context: EditorContext,
    candidates: Sequence[CandidateEdit],
    baseline: Baseline,
    strengths: Sequence[float],
) -> Stepper[list[GuardResult]]:
    """Compose the version that contains the candidates at the given strengths, measure it, and apply the guard to
    each."""
    scaled_updates = [
        [p.scaled(s) for p in d.factors.updates] for d, s in zip(candidates, strengths, strict=True)
    ]
    all_updates = baseline.active_updates + [a for group in scaled_updates for a in group]
    patch = yield from replica.compose_patch_in_steps(all_updates)
    yield Progress(Phase.COMPOSE, 1, 1)
    resolved_edits = [d.resolved_edit for d in candidates]
    after = yield from replica.step_with_patch(
        patch, measure_version(replica, context, resolved_edits, baseline.regression_probes)
    )
    after = yield from _with_descriptions(replica, patch, baseline.descriptions, after)
    weights_in_range = {weight_ref for weight_ref, weight in patch.weights.items() if is_in_range(weight)}
    guard_results: list[GuardResult] = []
    for i, (candidate, group) in enumerate(zip(candidates, scaled_updates, strict=True)):
        norms = _norm_ratios(replica, baseline, group, weights_in_range)
        required_margin = baseline.strength_schedule(candidate.resolved_edit, replica.base).required_margin(
            strengths[i]
        )
        guard_result = evaluate_guard(
            candidate.resolved_edit, baseline.measurements[i], after[i], strengths[i], norms, required_margin
        )
        guard_result = add_conflicts_and_capacity(
            candidate.resolved_edit, guard_result, baseline.conflicts[i], baseline.capacity[i]
        )
        guard_results.append(replace(guard_result, ball=_ball_of(patch, group)))
        if len(candidates) > 1:
            yield Progress(Phase.GUARD, len(guard_results), len(candidates))
    return guard_results


def _ball_of(patch: PatchSet, updates: Sequence[EditUpdate]) -> Ball | None:
    """Return where the entry of an edit acts in a version; None for an edit that has none."""
    codebooks = {p.codebook.layer: p.codebook for p in patch.patches if isinstance(p, CodebookPatch)}
    entries = [u for u in updates if isinstance(u, CodebookEntry)]
    return codebooks[entries[0].layer].ball_of(entries[0]) if entries else None


def measure_version(
    replica: VersionedModel,
    context: EditorContext,
    resolved_edits: Sequence[ResolvedEdit],
    regression_probes: dict[str, Probe],
    version: int | None = None,
) -> Stepper[list[VersionMeasurement]]:
    """Measure the model with its current weights for each of the edits.

    With the number of a committed version its perplexity is cached.
    """
    probes = [q for plan in resolved_edits for q in plan.probes]
    name_probes = [plan.name_probe for plan in resolved_edits if plan.name_probe is not None]
    all_probes = [*probes, *name_probes, *regression_probes.values()]
    results = iter((yield from run_probes(replica.base, all_probes)))
    results_by_edit = [[next(results) for _ in plan.probes] for plan in resolved_edits]
    names = [None if plan.name_probe is None else next(results) for plan in resolved_edits]
    holding = {edit for edit, question in regression_probes.items() if edit_holds(question, next(results))}
    texts_by_edit = yield from _generate_texts(replica, resolved_edits, version)
    perplexity = context.perplexities.get(version) if version is not None else None
    if perplexity is None:
        perplexity = yield from compute_perplexity(replica.base, context.reference_texts)
    if version is not None:
        context.cache_perplexity(version, perplexity)
    return [
        VersionMeasurement(
            results,
            preview.text,
            perplexity,
            holding,
            name=name,
            neighbor_texts=texts[plan.first_neighbor - 1 :],
            paraphrase_texts=texts[: plan.first_neighbor - 1],
        )
        for plan, results, name, (preview, *texts) in zip(
            resolved_edits, results_by_edit, names, texts_by_edit, strict=True
        )
    ]


def _generate_texts(
    replica: VersionedModel, resolved_edits: Sequence[ResolvedEdit], version: int | None
) -> Stepper[list[list[GreedyText]]]:
    """Return for each edit the greedy continuations of its prompt, its paraphrases and its neighbours. Those of
    neighbours that the service found at this version are known."""
    known = [_known_texts(plan, version) for plan in resolved_edits]
    prompts = [
        [
            plan.rewrite_probe.prompt,
            *(q.prompt for q in plan.paraphrase_probes),
            *(q.prompt for q in plan.neighborhood_probes if texts is None),
        ]
        for plan, texts in zip(resolved_edits, known, strict=True)
    ]
    generated = iter((yield from generate_greedy(replica.base, [p for group in prompts for p in group])))
    return [
        [*(next(generated) for _ in group), *(texts or ())]
        for group, texts in zip(prompts, known, strict=True)
    ]


def _known_texts(resolved_edit: ResolvedEdit, version: int | None) -> list[GreedyText] | None:
    found = resolved_edit.found_neighbors
    return found.texts if found is not None and found.version == version else None


def _norm_ratios(
    replica: VersionedModel,
    baseline: Baseline,
    updates: Sequence[EditUpdate],
    weights_in_range: set[WeightRef],
) -> dict[WeightRef, float]:
    """Return the norm of the change that an edit adds to the other active edits, as a multiple of the weight's norm.

    The change of the edit alone, not of the version: many sound edits together change a weight more than one unsound
    edit. It is infinite when a number of the weight, or of the edit's change alone, is beyond the range of the dtype:
    other edits can hide such a change until they are reverted.
    """
    by_weight: dict[WeightRef, list[WeightUpdate]] = {}
    for update in weight_updates(updates):
        by_weight.setdefault(update.weight_ref, []).append(update)
    ratios: dict[WeightRef, float] = {}
    for weight_ref, group in by_weight.items():
        base = replica.base.parameter(weight_ref).data
        if not (weight_ref in weights_in_range and all(is_change_in_range(u, base.dtype) for u in group)):
            ratios[weight_ref] = math.inf
            continue
        base_norm = float(torch.linalg.vector_norm(base, dtype=torch.float64))
        ratios[weight_ref] = baseline.own_changes.norm(group) / base_norm
    return ratios
