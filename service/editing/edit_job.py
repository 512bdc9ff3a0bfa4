"""Edits, from the request to the ledger: found on the base model, tried at head, landed, strengthened or rejected.

The associations are found on the base model and never again. What depends on the other active edits is only the trial:
the version that would come out is composed, put in place, and measured before anything is written. When another
edit lands meanwhile, the trial is repeated at the new head.

Edits that wait together are worked on together: their values are optimised side by side where a step has room for more
than one, and they are tried in one version. When all are fit they land in the order in which they came, one entry
of the ledger each; when not, those that are fit are tried without the others, and whoever is left is tried alone.
What goes wrong with one ends that one.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as library_version
from typing import Any, TypeVar

from torch import Tensor

from service.editing.candidate import (
    Baseline,
    CandidateEdit,
    GuardResult,
    ResolvedEdit,
    VersionMeasurement,
    evaluate_candidates,
    generate_greedy,
    measure_baseline,
)
from service.editing.context import EditorContext
from service.editing.edit_spec import EditFactors, EditSpec, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.editing.probes import Probe, ProbeResult, edit_holds, neighbor_preserved
from service.editing.strengthen import Assessment, choose_strengths
from service.engine.versioned_model import VersionedModel
from service.errors import Cancelled, Conflict, DigestMismatch, InvalidInput, Unavailable
from service.jobs import artifacts as parts
from service.jobs.job_store import ClaimedJob, JobStore
from service.kit import crash_points
from service.kit.steps import (
    JobFinished,
    JobProgress,
    JobSteps,
    JobUpdate,
    Phase,
    Progress,
    Stepper,
    retry_while_unavailable,
)
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import WeightRef
from service.models.memory_estimates import require_memory
from service.recipes.recipe import resolve_hparams
from service.schemas import EditRequest
from service.scores.scores import share_preferring_new, share_preferring_true
from service.weights.factors import DenseUpdate, EditUpdate, deserialize_updates, serialize_updates

HEAD_MOVED = Progress(Phase.RETRY, 0, 1)

T = TypeVar("T")


@dataclass(frozen=True)
class ImportedFactors:
    """What an imported edit brings along: its vectors, and what the ledger that it comes from says of how they were found."""

    factors: bytes
    body: dict[str, Any]


@dataclass(frozen=True)
class PreparedEdit:
    """A job among those that are worked on together, as far as it has come."""

    job: ClaimedJob
    started_at: float
    candidate: CandidateEdit
    imported_factors: ImportedFactors | None = None


def run_edits(
    replica: VersionedModel, job_store: JobStore, jobs: Sequence[ClaimedJob], context: EditorContext
) -> JobSteps:
    """Carry out edit jobs to their ends: applied (by a dry run without a version) or rejected; or ended with an error that a
    user should read."""
    for group in group_compatible_jobs(jobs):
        members = yield from _prepare_edits(replica, job_store, context, group)
        yield from _commit_group(replica, job_store, context, members)


def group_compatible_jobs(jobs: Iterable[ClaimedJob]) -> list[list[ClaimedJob]]:
    """Which jobs are worked on together, in their order.

    One edit of a subject at a time: the later may supersede the earlier, or be in conflict with it. Alone is a dry run, which is not to be judged beside edits that
    land, and whose worker died before: if it was this job's doing, it takes no others with it.
    """
    groups: list[list[ClaimedJob]] = []
    group_closed = True
    for job in jobs:
        exclusive = job.dry_run or job.attempt > 1
        if group_closed or exclusive or job.subject in {other.subject for other in groups[-1]}:
            groups.append([])
        groups[-1].append(job)
        group_closed = exclusive
    return groups


def _isolate_failures(job: ClaimedJob, steps: Stepper[T]) -> Generator[JobUpdate, None, T | None]:
    """The steps of one job. What goes wrong with it ends it; the others go on."""
    try:
        with closing(steps):
            while True:
                try:
                    progress = next(steps)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                yield JobProgress(job.id, progress)
    except (Unavailable, DigestMismatch):
        raise
    except Exception as error:
        yield JobFinished(job.id, error)
        return None


def _raise_if_cancelled(job_store: JobStore, job: ClaimedJob) -> None:
    if job_store.cancel_requested(job):
        raise Cancelled("the edit was cancelled before it landed.")


# what is wanted, and what is found for it


@dataclass(frozen=True)
class _ResolvedJob:
    """A job whose request is understood, and for which nothing was found yet."""

    job: ClaimedJob
    started_at: float
    resolved_edit: ResolvedEdit
    spec: EditSpec


def _prepare_edits(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, jobs: Sequence[ClaimedJob]
) -> Generator[JobUpdate, None, list[PreparedEdit]]:
    """Find the associations of each, on the base model whatever is active; of an edit that was imported they are given."""
    resolved_jobs: list[_ResolvedJob] = []
    members: list[PreparedEdit] = []
    for job in jobs:
        if is_imported(job):
            imported_edit = yield from _isolate_failures(
                job, _load_imported_edit(replica, job_store, context, job)
            )
            members += [] if imported_edit is None else [imported_edit]
            continue
        resolved_job = yield from _isolate_failures(job, _resolve_job(replica, job_store, context, job))
        if resolved_job is not None:
            resolved_jobs.append(resolved_job)
    resolved_by_id = {s.job.id: s for s in resolved_jobs}
    for batch in batch_edit_specs(replica.base, [s.spec for s in resolved_jobs]):
        members += yield from _find_or_isolate(
            replica, job_store, context, [resolved_by_id[wanted.edit] for wanted in batch]
        )
    position = {job.id: number for number, job in enumerate(jobs)}
    return sorted(members, key=lambda m: position[m.job.id])


def _resolve_job(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, job: ClaimedJob
) -> Stepper[_ResolvedJob]:
    started_at = time.monotonic()
    _raise_if_cancelled(job_store, job)
    request = EditRequest.model_validate(job.request)
    resolved_edit = yield from resolve_edit(replica, request, context)
    spec = yield from build_admitted_spec(replica, context, resolved_edit, job.id)
    return _ResolvedJob(job, started_at, resolved_edit, spec)


def _find_or_isolate(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    resolved_jobs: Sequence[_ResolvedJob],
) -> Generator[JobUpdate, None, list[PreparedEdit]]:
    """Side by side; should that fail, one by one, so that each has its own error."""
    finding = _find_batch(replica, job_store, context, resolved_jobs)
    if len(resolved_jobs) == 1:
        return (yield from _isolate_failures(resolved_jobs[0].job, finding)) or []
    try:
        return (yield from finding)
    except (Unavailable, DigestMismatch):
        raise
    except Exception:
        members: list[PreparedEdit] = []
        for s in resolved_jobs:
            members += yield from _find_or_isolate(replica, job_store, context, [s])
        return members


def _find_batch(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    resolved_jobs: Sequence[_ResolvedJob],
) -> Stepper[list[PreparedEdit]]:
    for s in resolved_jobs:
        _raise_if_cancelled(job_store, s.job)
    hparams = [s.resolved_edit.parameters for s in resolved_jobs]
    layers = sorted({x for p in hparams if isinstance(p, RomeParameters) for x in p.layers})
    statistics = yield from context.get_statistics(layers)
    factors = yield from find_batch_factors(replica.base, statistics, [s.spec for s in resolved_jobs])
    return [
        PreparedEdit(s.job, s.started_at, CandidateEdit(s.resolved_edit, f))
        for s, f in zip(resolved_jobs, factors, strict=True)
    ]


def is_imported(job: ClaimedJob) -> bool:
    """Whether an edit was found elsewhere."""
    return job.request.get("origin") is not None


def _load_imported_edit(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, job: ClaimedJob
) -> Stepper[PreparedEdit]:
    """An imported edit as it stands after the search that it has behind it: it lands as it is, or not at all."""
    started_at = time.monotonic()
    _raise_if_cancelled(job_store, job)
    artifacts = [job_store.get_artifact(job, name) for name in (parts.IMPORTED_FACTORS, parts.IMPORTED_BODY)]
    if None in artifacts:
        raise Conflict("what was imported is no longer kept: import it again.")
    factors, body = artifacts[0] or b"", json.loads(artifacts[1] or b"")
    request = EditRequest.model_validate({k: v for k, v in job.request.items() if k != "origin"})
    resolved_edit = yield from resolve_edit(replica, request, context)
    fixed_strength = {"strengths": (1.0,), "margin": 0.0, "required_margins": ()}
    resolved_edit = replace(
        resolved_edit, parameters=resolved_edit.parameters.model_copy(update=fixed_strength)
    )
    updates = deserialize_updates(factors, job.id, job.subject)
    delta_norm = math.sqrt(sum(float(_update_tensor(p).double().norm()) ** 2 for p in updates))
    return PreparedEdit(
        job,
        started_at,
        CandidateEdit(resolved_edit, EditFactors(updates, [], delta_norm, 0.0)),
        ImportedFactors(factors, body),
    )


def _update_tensor(update: EditUpdate) -> Tensor:
    return update.change if isinstance(update, DenseUpdate) else update.value


def resolve_edit(
    replica: VersionedModel, request: EditRequest, context: EditorContext
) -> Stepper[ResolvedEdit]:
    """Resolve the hyperparameters, and the true object when the user names none: what the base model answers."""
    model = replica.base
    parameters = resolve_hparams(context.recipe, request.hparams, model.num_layers, request.method or "rome")
    prompt, objective = fill_prompt(request.prompt, request.subject).text, request.objective
    target_true = request.target_true
    if target_true is None:
        (answer,) = yield from generate_greedy(model, [prompt])
        target_true = answer.split("\n")[0].split(".")[0].split(",")[0].strip() or "?"
    target_new = request.target_new if objective == "write" and request.target_new else target_true
    if target_new == "?":
        raise InvalidInput("the base model gives no answer: name the true object.", "target_true")
    paraphrase = [fill_prompt(p, request.subject).text if "{}" in p else p for p in request.probes.paraphrase]
    return ResolvedEdit(
        request,
        parameters,
        Probe(prompt, target_new, target_true, objective),
        [Probe(p, target_new, target_true, objective) for p in paraphrase],
        [Probe(n.prompt, target_new, n.target, objective) for n in request.probes.neighborhood],
    )


def build_admitted_spec(
    replica: VersionedModel, context: EditorContext, resolved_edit: ResolvedEdit, edit: str
) -> Stepper[EditSpec]:
    """What the editor is asked for. Refused when there is no room for the search."""
    parameters, request, model = resolved_edit.parameters, resolved_edit.request, replica.base
    contexts: list[str] = []
    if isinstance(parameters, RomeParameters):
        contexts = yield from context.get_contexts(parameters.contexts, parameters.seed)
    statement = fill_prompt(request.prompt, request.subject)
    spec = build_edit_spec(
        model,
        contexts,
        statement,
        resolved_edit.rewrite_probe.new,
        parameters,
        edit,
        resolved_edit.method,
        request.objective,
    )
    require_memory(
        "this edit", spec.peak_bytes(model), model.device, "use a shorter prompt or fewer contexts", "prompt"
    )
    return spec


# trying and landing


def _commit_group(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, members: Sequence[PreparedEdit]
) -> JobSteps:
    """Try them in one version, and land them when all are fit; else the fit without the others, and the others alone.

    Where none is fit, what is wrong may be what they do together: then halves are tried.
    """
    if len(members) < 2:
        for m in members:
            yield from _isolate_failures(m.job, commit_alone(replica, job_store, context, m))
            yield JobFinished(m.job.id)
        return
    head = replica.head()
    candidates = [m.candidate for m in members]
    baseline = yield from measure_baseline(replica, context, candidates, head)
    guard_results = yield from choose_candidate_strengths(replica, context, candidates, baseline)
    passing = [
        m
        for m, t in zip(members, guard_results, strict=True)
        if t.accepted or not m.candidate.resolved_edit.request.guard.enabled
    ]
    if len(passing) == len(members):
        remaining = yield from _commit_in_order(replica, job_store, context, members, guard_results, head)
        yield from _commit_group(replica, job_store, context, remaining)
        return
    failing = [m for m in members if m not in passing]
    middle = len(members) // 2
    subgroups = [passing, *([m] for m in failing)] if passing else [members[:middle], members[middle:]]
    for subgroup in subgroups:
        yield from _commit_group(replica, job_store, context, subgroup)


def _commit_in_order(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    members: Sequence[PreparedEdit],
    guard_results: Sequence[GuardResult],
    head: int,
) -> Generator[JobUpdate, None, Sequence[PreparedEdit]]:
    """Land them one after another; returns those that must be tried again, because head is not what they were tried on."""
    edit_ids = [m.job.id for m in members]
    for number, (m, guard_result) in enumerate(zip(members, guard_results, strict=True)):
        others = [name for name in edit_ids if name != m.job.id]
        try:
            _raise_if_cancelled(job_store, m.job)
            yield from _commit_one(replica, job_store, context, m, guard_result, head + number, others)
        except Conflict:
            yield HEAD_MOVED
            return members[number:]
        except (Unavailable, DigestMismatch):
            raise
        except Exception as error:
            yield JobFinished(m.job.id, error)
            return members[number + 1 :]
        if m is members[-1]:
            context.cache_perplexity(head + len(members), guard_result.after.perplexity)
        yield JobFinished(m.job.id)
    return []


def _commit_one(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    member: PreparedEdit,
    guard_result: GuardResult,
    head: int,
    batched_with: Sequence[str],
) -> Stepper[None]:
    resolved_edit, edit_factors = member.candidate.resolved_edit, member.candidate.factors
    result = edit_report(
        resolved_edit, edit_factors, guard_result, time.monotonic() - member.started_at, batched_with
    )
    if member.imported_factors is None:
        factors = serialize_updates([p.scaled(guard_result.strength) for p in edit_factors.updates])
        body = build_provenance(replica, context, resolved_edit, guard_result)
    else:
        origin = {"origin": member.job.request["origin"], "supersedes": list(guard_result.supersedes)}
        factors, body = (
            member.imported_factors.factors,
            {**member.imported_factors.body, **origin, "fingerprint": replica.base.fingerprint},
        )
    crash_points.crash_point("edit.after_compute")
    yield from retry_while_unavailable(
        partial(job_store.commit_edit, member.job, head, factors, body, result)
    )


def commit_alone(
    replica: VersionedModel, job_store: JobStore, context: EditorContext, member: PreparedEdit
) -> Stepper[None]:
    """Try it, stronger and stronger until it takes, and land it; or end it as evaluated or rejected."""
    job, candidate = member.job, member.candidate
    request = candidate.resolved_edit.request
    while True:
        head = replica.head()
        baseline = yield from measure_baseline(replica, context, [candidate], head)
        (guard_result,) = yield from choose_candidate_strengths(replica, context, [candidate], baseline)
        acceptable = guard_result.passed or not request.guard.enabled
        _raise_if_cancelled(job_store, job)
        if request.dry_run or not acceptable:
            result = edit_report(
                candidate.resolved_edit, candidate.factors, guard_result, time.monotonic() - member.started_at
            )
            yield from retry_while_unavailable(
                partial(job_store.finish, job, "dry_run_passed" if acceptable else "rejected", result)
            )
            return
        try:
            yield from _commit_one(replica, job_store, context, member, guard_result, head, ())
        except Conflict:
            yield HEAD_MOVED
        else:
            context.cache_perplexity(head + 1, guard_result.after.perplexity)
            return


def choose_candidate_strengths(
    replica: VersionedModel, context: EditorContext, candidates: Sequence[CandidateEdit], baseline: Baseline
) -> Stepper[list[GuardResult]]:
    """Choose the strengths of candidates that are measured in one version; return the guard's result of each at its strength."""

    def assess(i: int, _strength: float, result: GuardResult) -> Assessment:
        guard_enabled = candidates[i].resolved_edit.request.guard.enabled
        return Assessment(result.accepted or not guard_enabled, result.passed, result.effective)

    schedules = [baseline.strength_schedule(c.resolved_edit, replica.base).strengths for c in candidates]
    measure = partial(evaluate_candidates, replica, context, candidates, baseline)
    choices = yield from choose_strengths(schedules, measure, assess)
    return [choice.measurement for choice in choices]


# what is said of it, and kept


def edit_report(
    resolved_edit: ResolvedEdit,
    factors: EditFactors,
    guard_result: GuardResult,
    seconds: float,
    batched_with: Sequence[str] = (),
) -> dict[str, Any]:
    """An edit's result, for people and programs: JSON. `together` are the edits that were tried in the same version."""
    before, after = guard_result.before, guard_result.after
    first_neighbor = 1 + len(resolved_edit.paraphrase_probes)

    def both(i: int) -> dict[str, Any]:
        return {
            "prompt": resolved_edit.probes[i].prompt,
            "new": resolved_edit.probes[i].new,
            "true": resolved_edit.probes[i].true,
            "before": before.probe_results[i].probabilities(),
            "after": after.probe_results[i].probabilities(),
        }

    def scores(measured: VersionMeasurement) -> dict[str, float | None]:
        if resolved_edit.request.objective != "write":
            return _objective_scores(resolved_edit, measured)
        log_p = [(a.new, a.true) for a in measured.probe_results]
        return {
            "ES": share_preferring_new(log_p[:1]),
            "PS": share_preferring_new(log_p[1:first_neighbor]),
            "NS": share_preferring_true(log_p[first_neighbor:]),
        }

    return {
        "target_true": resolved_edit.rewrite_probe.true,
        "objective": resolved_edit.request.objective,
        "rewrite": both(0) | {"text_before": before.preview_text, "text_after": after.preview_text},
        "paraphrase": [both(i) for i in range(1, first_neighbor)],
        "neighborhood": [both(i) for i in range(first_neighbor, len(resolved_edit.probes))],
        "scores": {"before": scores(before), "after": scores(after)},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "delta_norm": factors.delta_norm,
        "norm_ratio": {weight_label(site): r for site, r in guard_result.norm_ratio.items()},
        "layers": sorted({p.layer for p in factors.updates}),
        "strength": guard_result.strength,
        "optimisation": {"steps": len(factors.losses), "first": factors.losses[0], "last": factors.losses[-1]}
        if factors.losses
        else None,
        "regressed_edits": guard_result.regressed_edits,
        "conflicts": [
            {
                "edit": r.edit,
                "prompt": r.prompt,
                "target_new": r.target_new,
                "probability": r.probability,
                "cosine": r.cosine,
            }
            for r in guard_result.conflicts
        ],
        "supersedes": list(guard_result.supersedes),
        "capacity": {str(x): left for x, left in sorted(guard_result.capacity.items())},
        "batched_with": list(batched_with),
        "guard": {
            "passed": guard_result.passed,
            "checks": [
                {"name": c.name, "passed": c.passed, "figure": c.figure, "limit": c.limit}
                for c in guard_result.checks
            ],
        },
        "reason": _rejection_reason(guard_result),
        "seconds": round(seconds, 3),
    }


def _objective_scores(
    resolved_edit: ResolvedEdit, measurement: VersionMeasurement
) -> dict[str, float | None]:
    """Of an erasure or an amplification: the shares of its prompts that do what it is for, and of the neighbours that are right."""
    probe_results = list(zip(resolved_edit.probes, measurement.probe_results, strict=True))
    first_neighbor = 1 + len(resolved_edit.paraphrase_probes)

    def share(does: Callable[[Probe, ProbeResult], bool], some: slice) -> float | None:
        found = [does(*one) for one in probe_results[some]]
        return sum(found) / len(found) if found else None

    return {
        "ES": share(edit_holds, slice(0, 1)),
        "PS": share(edit_holds, slice(1, first_neighbor)),
        "NS": share(neighbor_preserved, slice(first_neighbor, None)),
    }


def weight_label(site: WeightRef) -> str:
    """What a report calls an edited weight: its layer alone where it is the MLP's."""
    return str(site.layer) if site.part == "mlp" else f"{site.layer}.{site.part}"


_REASONS_BY_OBJECTIVE = {
    "erase": {
        "efficacy": "the edit did not take: the true object is still said, or too little of its probability is gone"
    },
    "amplify": {
        "efficacy": "the edit did not take: the true object is not said, or its probability rose too little"
    },
}
_REASON_BY_CHECK = {
    "efficacy": "the edit did not take: the new object is not more probable than the old one",
    "probability": "the new object is less probable than asked for",
    "paraphrase": "too few paraphrases say the new object",
    "neighborhood": "too many neighbourhood prompts lost their answer",
    "perplexity": "plain text became too improbable",
    "norm": "the change of the weight is too large",
    "capacity": "active edits have spoken for too much of the edit's key: revert some, or name other layers",
    "conflict": "an active edit says the same relation in other words",
    "regressions": "other active edits would cease to hold",
}


def _rejection_reason(guard_result: GuardResult) -> str | None:
    """Why an edit was rejected, in words; None when it passed."""
    reasons = _REASON_BY_CHECK | _REASONS_BY_OBJECTIVE.get(guard_result.objective, {})
    failed = [
        f"{reasons[c.name]} ({c.figure:.3g}, limit {c.limit:.3g})"
        for c in guard_result.checks
        if not c.passed
    ]
    return "; ".join(failed) or None


def build_provenance(
    replica: VersionedModel, context: EditorContext, resolved_edit: ResolvedEdit, guard_result: GuardResult
) -> dict[str, Any]:
    """What the ledger keeps, so that replaying it gives the same factors (design, section 2.6)."""
    model, layers = replica.base, resolved_edit.parameters.layers
    keyed = layers if isinstance(resolved_edit.parameters, RomeParameters) else ()
    return {
        "method": resolved_edit.method,
        "objective": resolved_edit.request.objective,
        "hparams": resolved_edit.parameters.model_dump(mode="json"),
        "strength": guard_result.strength,
        "resolved_true": resolved_edit.rewrite_probe.true,
        "supersedes": list(guard_result.supersedes),
        "statistics": {str(x): context.statistics[x].digest for x in keyed},
        "corpus": context.corpus.digest,
        "dtype": str(model.weight(layers[0]).dtype).removeprefix("torch."),
        "device": str(model.device),
        "libraries": {name: library_version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "fingerprint": model.fingerprint,
    }
