"""Edit jobs, from the request to the ledger: resolved, computed on the base model, measured at head, and committed or
rejected.

The factors of an edit are computed on the base model, once. Only the measurement depends on the other active edits:
the version that would result is composed and measured before anything is written. When another edit is committed
meanwhile, the measurement is repeated at the new head.

Jobs that wait together are processed together: their values are optimized in one batch when the compute budget of a
step allows it, and they are measured in one version. When all pass they are committed in the order of their
submission, one ledger entry each. Otherwise those that pass are measured without the others, and each of the others
alone. An error ends only the job that caused it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from service.editing.auto_probes import AutoProbes
from service.editing.candidate import CandidateEdit, ResolvedEdit
from service.editing.context import EditorContext
from service.editing.edit_report import build_provenance, edit_report
from service.editing.edit_spec import EditFactors, EditSpec, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.editing.gate_openings import find_openings
from service.editing.greedy_text import generate_greedy
from service.editing.guard import GuardResult
from service.editing.layer_search import at_layer, choose_layer, must_choose_layer, trial_of
from service.editing.measure import (
    Baseline,
    evaluate_candidates,
    measure_baseline,
    require_other_answer,
)
from service.editing.probes import NO_OBJECT, Probe, probe_fits
from service.editing.restatement import name_prompt
from service.editing.strengthen import Assessment, choose_strengths
from service.editing.subject_token import SubjectToken, choose_subject_token
from service.engine.versioned_model import VersionedModel
from service.errors import Cancelled, Conflict, DigestMismatch, InvalidInput, Unavailable
from service.jobs import artifacts
from service.jobs.job_store import ClaimedJob, JobStore
from service.kit import crash_points
from service.kit.answer import is_object_certain
from service.kit.separator import Separator, certain_separator
from service.kit.steps import JobReporter, Phase, Progress, Stepper, report_to, retry_while_unavailable
from service.methods.registry import DEFAULT_METHOD, get_method
from service.models.loading import LoadedModel
from service.models.memory_estimates import require_memory
from service.models.separator_choice import choose_separator
from service.recipes.default import layers_to_try
from service.recipes.recipe import Recipe, resolve_hparams
from service.schemas import EditRequest
from service.weights.factors import (
    CodebookEntry,
    DenseUpdate,
    EditUpdate,
    StatementRecord,
    deserialize_updates,
    serialize_updates,
    shared_factors,
)

ANSWER_TOKENS = 16  # at most, of the answer whose beginning is the true object, where a request names none
HEAD_MOVED = Progress(Phase.RETRY, 0, 1)
JOB_ENDED = Progress(Phase.COMMIT, 1, 1)

T = TypeVar("T")


@dataclass(frozen=True)
class ImportedFactors:
    """The factors of an imported edit, as bytes, and the provenance that its ledger recorded."""

    factors: bytes
    body: dict[str, Any]


@dataclass(frozen=True)
class ResolvedJob:
    """A job whose request is resolved and whose factors are not yet computed."""

    job: ClaimedJob
    started_at: float
    resolved_edit: ResolvedEdit
    spec: EditSpec


@dataclass(frozen=True)
class PreparedEdit:
    """A job whose factors are computed or imported."""

    job: ClaimedJob
    started_at: float
    candidate: CandidateEdit
    imported_factors: ImportedFactors | None = None


def run_edits(
    replica: VersionedModel,
    job_store: JobStore,
    context: EditorContext,
    reporter: JobReporter,
    jobs: Sequence[ClaimedJob],
) -> Stepper[None]:
    """Process edit jobs to their ends: applied, rejected, or failed. A dry run ends without a version."""
    run = _EditRun(replica, job_store, context, reporter, [job.id for job in jobs])
    for group in group_compatible_jobs(jobs):
        yield from run.process_group(group)


def group_compatible_jobs(jobs: Iterable[ClaimedJob]) -> list[list[ClaimedJob]]:
    """Return the jobs in groups that are processed together, in their order.

    A group has at most one edit of each subject, because a later edit may supersede an earlier one or be in conflict
    with it. A dry run is a group of its own, so that it is not measured with edits that are committed. So is a job
    whose worker died before: if it caused the crash, it takes no other job with it.
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


def is_imported(job: ClaimedJob) -> bool:
    """Whether the factors of an edit come from another ledger."""
    return job.request.get("origin") is not None


class _EditRun:
    """The processing of the jobs that a worker claimed together."""

    def __init__(
        self,
        replica: VersionedModel,
        job_store: JobStore,
        context: EditorContext,
        reporter: JobReporter,
        job_ids: Sequence[str],
    ) -> None:
        self.replica, self.job_store, self.context = replica, job_store, context
        self.reporter, self.job_ids = reporter, job_ids

    def process_group(self, jobs: Sequence[ClaimedJob]) -> Stepper[None]:
        """Compute the factors of a group of jobs, then measure and commit them."""
        yield from self._for_all(self.context.get_corpus())  # for the guard, and for every closed form
        yield from self._commit_group((yield from self._prepare(jobs)))

    # reports

    def _for_all(self, steps: Stepper[T]) -> Stepper[T]:
        """Report the progress of shared steps as that of all jobs."""
        return report_to(self.reporter, self.job_ids, steps)

    def _isolate(self, job: ClaimedJob, steps: Stepper[T]) -> Stepper[T | None]:
        """Run the steps of one job. An error ends this job, and the result is None."""
        try:
            return (yield from report_to(self.reporter, [job.id], steps))
        except (Unavailable, DigestMismatch):
            raise
        except Exception as error:
            yield from self._end(job, error)
            return None

    def _end(self, job: ClaimedJob, error: Exception | None = None) -> Stepper[None]:
        self.reporter.finished(job.id, error)
        yield JOB_ENDED

    def _raise_if_cancelled(self, job: ClaimedJob) -> None:
        if self.job_store.cancel_requested(job):
            raise Cancelled("the edit was cancelled before it was committed.")

    # resolving requests and computing factors

    def _prepare(self, jobs: Sequence[ClaimedJob]) -> Stepper[list[PreparedEdit]]:
        """Compute the factors of each job on the base model, or load those of an imported edit. Jobs that fail are
        left out."""
        resolved_jobs: dict[str, ResolvedJob] = {}
        prepared: list[PreparedEdit] = []
        for job in jobs:
            if is_imported(job):
                imported_edit = yield from self._isolate(job, self._load_imported(job))
                prepared += [] if imported_edit is None else [imported_edit]
            elif (resolved_job := (yield from self._isolate(job, self._resolve(job)))) is not None:
                resolved_jobs[job.id] = resolved_job
        for batch in batch_edit_specs(self.replica.base, [r.spec for r in resolved_jobs.values()]):
            prepared += yield from self._find_or_isolate([resolved_jobs[spec.edit] for spec in batch])
        position = {job.id: number for number, job in enumerate(jobs)}
        return sorted(prepared, key=lambda p: position[p.job.id])

    def _resolve(self, job: ClaimedJob) -> Stepper[ResolvedJob]:
        started_at = time.monotonic()
        self._raise_if_cancelled(job)
        request = EditRequest.model_validate(job.request)
        resolved_edit = yield from resolve_edit(self.replica, request, self.context)
        yield from require_other_answer(self.replica, resolved_edit, self.replica.head())
        if request.try_layers:
            layers = {*layers_to_try(self.replica.base.num_layers), *resolved_edit.parameters.layers}
            trials = {layer: at_layer(resolved_edit, layer) for layer in sorted(layers)}
            resolved_edit, _ = yield from self._try_layers(resolved_edit, job.id, trials)
        elif must_choose_layer(self.context, resolved_edit):
            resolved_edit = yield from self._choose_layer(resolved_edit, job.id)
        spec = yield from build_admitted_spec(self.replica, self.context, resolved_edit, job.id)
        return ResolvedJob(job, started_at, resolved_edit, spec)

    def _choose_layer(self, resolved_edit: ResolvedEdit, edit: str) -> Stepper[ResolvedEdit]:
        """Return the edit at the layer at which it is best, and keep that layer as the recipe of the model; where
        another worker has chosen one meanwhile, at that layer."""
        recipe = self.context.recipe
        assert recipe is not None
        provisional = self.context.read_provisional_recipe()
        if provisional is not None:
            return at_layer(resolved_edit, *provisional.rome.layers)
        trials = {layer: trial_of(resolved_edit, layer) for layer in recipe.candidate_layers}
        chosen, found = yield from self._try_layers(resolved_edit, edit, trials)
        if found is not None:
            self.context.keep_provisional_recipe(found)
        return chosen

    def _try_layers(
        self, resolved_edit: ResolvedEdit, edit: str, trials: Mapping[int, ResolvedEdit]
    ) -> Stepper[tuple[ResolvedEdit, Recipe | None]]:
        """Return the edit at the best of some layers, and the recipe with it; None when the edit fails at all of them.
        `trials`: the edit as it is tried at each layer."""
        specs: dict[int, EditSpec] = {}
        for layer, trial in trials.items():
            specs[layer] = yield from build_admitted_spec(self.replica, self.context, trial, edit)
        return (yield from choose_layer(self.replica, self.context, resolved_edit, specs))

    def _find_or_isolate(self, resolved_jobs: Sequence[ResolvedJob]) -> Stepper[list[PreparedEdit]]:
        """Compute the factors of a batch. When that fails, compute them one by one, so that each job gets its own
        error."""
        finding = self._find_batch(resolved_jobs)
        if len(resolved_jobs) == 1:
            return (yield from self._isolate(resolved_jobs[0].job, finding)) or []
        try:
            return (yield from self._for_all(finding))
        except (Unavailable, DigestMismatch):
            raise
        except Exception:
            prepared: list[PreparedEdit] = []
            for resolved_job in resolved_jobs:
                prepared += yield from self._find_or_isolate([resolved_job])
            return prepared

    def _find_batch(self, resolved_jobs: Sequence[ResolvedJob]) -> Stepper[list[PreparedEdit]]:
        for r in resolved_jobs:
            self._raise_if_cancelled(r.job)
        edits = [r.resolved_edit for r in resolved_jobs]
        layers = sorted({x for e in edits for x in get_method(e.method).statistics_layers(e.parameters)})
        statistics = yield from self.context.get_statistics(layers)
        factors = yield from find_batch_factors(
            self.replica.base, statistics, [r.spec for r in resolved_jobs]
        )
        prepared: list[PreparedEdit] = []
        for r, f in zip(resolved_jobs, factors, strict=True):
            candidate = yield from self._make_candidate(r.resolved_edit, f)
            prepared.append(PreparedEdit(r.job, r.started_at, candidate))
        return prepared

    def _make_candidate(self, resolved_edit: ResolvedEdit, factors: EditFactors) -> Stepper[CandidateEdit]:
        prompts = [probe.prompt for probe in resolved_edit.probes]
        openings = yield from find_openings(self.replica.base, factors.updates, prompts)
        return CandidateEdit(resolved_edit, factors, openings)

    def _load_imported(self, job: ClaimedJob) -> Stepper[PreparedEdit]:
        """Load the factors of an imported edit. Its strength is fixed: the edit is committed with these bytes or
        rejected."""
        started_at = time.monotonic()
        self._raise_if_cancelled(job)
        stored = [
            self.job_store.get_artifact(job, name)
            for name in (artifacts.IMPORTED_FACTORS, artifacts.IMPORTED_BODY)
        ]
        if None in stored:
            raise Conflict("the imported factors are no longer stored: import the edit again.")
        factors, body = stored[0] or b"", json.loads(stored[1] or b"")
        request = EditRequest.model_validate({k: v for k, v in job.request.items() if k != "origin"})
        resolved_edit = yield from resolve_edit(self.replica, request, self.context)
        fixed_strength = {"strengths": (1.0,), "margin": 0.0, "required_margins": ()}
        resolved_edit = replace(
            resolved_edit, parameters=resolved_edit.parameters.model_copy(update=fixed_strength)
        )
        updates = deserialize_updates(factors, job.id, job.subject, self.replica.find_shared)
        delta_norm = math.sqrt(sum(float(_update_tensor(p).double().norm()) ** 2 for p in updates))
        token = SubjectToken(**body["subject_token"]) if body.get("subject_token") else None
        edit_factors = EditFactors(updates, [], delta_norm, 0.0, token)
        candidate = yield from self._make_candidate(resolved_edit, edit_factors)
        return PreparedEdit(job, started_at, candidate, ImportedFactors(factors, body))

    # measuring and committing

    def _commit_group(self, prepared: Sequence[PreparedEdit]) -> Stepper[None]:
        """Measure edits in one version, and commit them when all pass. Otherwise process those that pass without the
        others, and each of the others alone.

        When none passes, the cause may be their combination: then the group is split into halves.
        """
        if len(prepared) < 2:
            for p in prepared:
                if (yield from self._isolate(p.job, self._commit_alone(p))):
                    yield from self._end(p.job)
            return
        head = self.replica.head()
        candidates = [p.candidate for p in prepared]
        baseline = yield from self._for_all(measure_baseline(self.replica, self.context, candidates, head))
        guard_results = yield from self._for_all(
            choose_candidate_strengths(self.replica, self.context, candidates, baseline)
        )
        passing = [
            p
            for p, result in zip(prepared, guard_results, strict=True)
            if result.accepted or (result.finite and not p.candidate.resolved_edit.request.guard.enabled)
        ]
        if len(passing) == len(prepared):
            remaining = yield from self._commit_in_order(prepared, guard_results, head)
            yield from self._commit_group(remaining)
            return
        failing = [p for p in prepared if p not in passing]
        middle = len(prepared) // 2
        subgroups = [passing, *([p] for p in failing)] if passing else [prepared[:middle], prepared[middle:]]
        for subgroup in subgroups:
            yield from self._commit_group(subgroup)

    def _commit_in_order(
        self, prepared: Sequence[PreparedEdit], guard_results: Sequence[GuardResult], head: int
    ) -> Stepper[Sequence[PreparedEdit]]:
        """Commit edits one after another. Return those that must be measured again because head changed."""
        edit_ids = [p.job.id for p in prepared]
        for number, (p, guard_result) in enumerate(zip(prepared, guard_results, strict=True)):
            others = [edit for edit in edit_ids if edit != p.job.id]
            try:
                self._raise_if_cancelled(p.job)
                yield from self._for_all(self._commit_one(p, guard_result, head + number, others))
            except Conflict:
                yield from self._for_all(_one_step(HEAD_MOVED))
                return prepared[number:]
            except (Unavailable, DigestMismatch):
                raise
            except Exception as error:
                yield from self._end(p.job, error)
                return prepared[number + 1 :]
            if p is prepared[-1]:
                self.context.cache_perplexity(head + len(prepared), guard_result.after.perplexity)
            yield from self._end(p.job)
        return []

    def _commit_one(
        self, prepared: PreparedEdit, guard_result: GuardResult, head: int, batched_with: Sequence[str]
    ) -> Stepper[None]:
        """Commit one edit at version head + 1. Raise Conflict when head is another version by now."""
        resolved_edit, edit_factors = prepared.candidate.resolved_edit, prepared.candidate.factors
        seconds = time.monotonic() - prepared.started_at
        result = edit_report(prepared.candidate, guard_result, seconds, batched_with)
        if prepared.imported_factors is None:
            factors = serialize_updates([p.scaled(guard_result.strength) for p in edit_factors.updates])
            body = build_provenance(
                self.replica, self.context, resolved_edit, guard_result, edit_factors.subject_token
            )
        else:
            factors = prepared.imported_factors.factors
            body = {
                **prepared.imported_factors.body,
                "origin": prepared.job.request["origin"],
                "supersedes": list(guard_result.supersedes),
                "fingerprint": self.replica.base.fingerprint,
            }
        crash_points.crash_point("edit.after_compute")
        shared = {s.digest: s.serialize() for s in shared_factors(edit_factors.updates)}
        yield from retry_while_unavailable(
            partial(self.job_store.commit_edit, prepared.job, head, factors, body, result, shared)
        )

    def _commit_alone(self, prepared: PreparedEdit) -> Stepper[bool]:
        """Choose the strength of an edit and commit it, or end it as rejected or as a dry run. Repeat when head
        changed meanwhile."""
        job, candidate = prepared.job, prepared.candidate
        request = candidate.resolved_edit.request
        while True:
            head = self.replica.head()
            baseline = yield from measure_baseline(self.replica, self.context, [candidate], head)
            (guard_result,) = yield from choose_candidate_strengths(
                self.replica, self.context, [candidate], baseline
            )
            acceptable = guard_result.finite and (guard_result.passed or not request.guard.enabled)
            self._raise_if_cancelled(job)
            if request.dry_run or not acceptable:
                seconds = time.monotonic() - prepared.started_at
                result = edit_report(candidate, guard_result, seconds)
                status = "dry_run_passed" if acceptable else "rejected"
                yield from retry_while_unavailable(partial(self.job_store.finish, job, status, result))
                return True
            try:
                yield from self._commit_one(prepared, guard_result, head, ())
            except Conflict:
                yield HEAD_MOVED
            else:
                self.context.cache_perplexity(head + 1, guard_result.after.perplexity)
                return True


def _one_step(progress: Progress) -> Stepper[None]:
    yield progress


def _update_tensor(update: EditUpdate) -> Tensor:
    """Return what an update changes: a weight, or a value; nothing for a statement."""
    if isinstance(update, StatementRecord):
        return torch.zeros(())
    if isinstance(update, CodebookEntry):
        return update.value - update.output
    return update.change if isinstance(update, DenseUpdate) else update.value


def resolve_edit(
    replica: VersionedModel, request: EditRequest, context: EditorContext
) -> Stepper[ResolvedEdit]:
    """Resolve the hyperparameters, the probes and, when the request names none, the true object: the answer of the base
    model."""
    model = replica.base
    parameters = resolve_hparams(
        context.recipe, request.hparam_overrides, model.num_layers, request.method or DEFAULT_METHOD
    )
    prompt, objective = request.statement.text, request.objective
    target_true = request.target_true
    if target_true is None:
        (answer,) = yield from generate_greedy(model, [prompt], ANSWER_TOKENS, is_object_certain)
        target_true = answer.answer or NO_OBJECT
    target_new = request.target_new if objective == "write" and request.target_new else target_true
    if target_new == NO_OBJECT:
        raise InvalidInput("the base model gives no answer: name the true object.", "target_true")
    rewrite = Probe(prompt, target_new, target_true, objective)
    rewrite = replace(rewrite, separator=(yield from _choose_separator(model, rewrite, request.separator)))
    name_probe = _name_probe(model, request)
    auto = AutoProbes(replica, context, request, parameters, rewrite)
    if request.given_paraphrases is None:
        paraphrases = yield from auto.find_paraphrases()
    else:
        paraphrases = yield from _with_separators(model, _given_paraphrases(request, rewrite), request)
    if request.given_neighbors is None:
        found = yield from auto.find_neighbors(replica.head())
        return ResolvedEdit(request, parameters, rewrite, paraphrases, found.probes, found, name_probe)
    neighbors = yield from _with_separators(model, _given_neighbors(request, rewrite), request)
    return ResolvedEdit(request, parameters, rewrite, paraphrases, neighbors, name_probe=name_probe)


def _name_probe(model: LoadedModel, request: EditRequest) -> Probe | None:
    """Return the probe of the subject's name in a restatement of the fact; None if there is none, or it exceeds the
    context length."""
    found = name_prompt(model, request.statement)
    if found is None:
        return None
    prompt, separator = found
    name = request.subject.strip()
    probe = Probe(prompt, name, name, separator=separator)
    return probe if probe_fits(model, probe) else None


def _given_paraphrases(request: EditRequest, rewrite: Probe) -> list[Probe]:
    texts = request.paraphrase_texts()
    return [Probe(text, rewrite.new, rewrite.true, rewrite.objective) for text in texts]


def _given_neighbors(request: EditRequest, rewrite: Probe) -> list[Probe]:
    neighbors = request.given_neighbors or ()
    return [Probe(n.prompt_text, rewrite.new, n.target, rewrite.objective) for n in neighbors]


def _with_separators(
    model: LoadedModel, probes: Sequence[Probe], request: EditRequest
) -> Stepper[list[Probe]]:
    """Return probes with their separators.

    That of the request is for the prompt of the edit. Other prompts can end in another way: they have it where their
    own is not certain.
    """
    separated: list[Probe] = []
    for probe in probes:
        given = request.separator if certain_separator(probe.prompt, probe.new) is None else None
        chosen = yield from _choose_separator(model, probe, given)
        separated.append(replace(probe, separator=chosen))
    return separated


def _choose_separator(model: LoadedModel, probe: Probe, given: Separator | None) -> Stepper[Separator]:
    """Return the given separator of a probe, or the one that the base model prefers."""
    objects = [probe.new, *([probe.true] if probe.true != NO_OBJECT else [])]
    return (yield from choose_separator(model, probe.prompt, objects, given))


def build_admitted_spec(
    replica: VersionedModel, context: EditorContext, resolved_edit: ResolvedEdit, edit: str
) -> Stepper[EditSpec]:
    """Return the specification of an edit. Raise InvalidInput when the search needs more memory than is free."""
    parameters, request, model = resolved_edit.parameters, resolved_edit.request, replica.base
    contexts = yield from context.prepare_method(resolved_edit.method, parameters)
    statement = request.statement
    spec = build_edit_spec(
        model,
        contexts,
        statement,
        resolved_edit.rewrite_probe.new,
        parameters,
        edit,
        resolved_edit.method,
        request.objective,
        separator=resolved_edit.rewrite_probe.separator,
        tokens_after=(yield from choose_subject_token(model, statement, parameters)),
        gate_reference=(yield from context.get_gate_reference(parameters)),
        gradient_statistics=context.gradient_statistics,
        classifier=context.get_scope_classifier(parameters),
    )
    require_memory(
        "this edit", spec.peak_bytes(model), model.device, "use a shorter prompt or fewer contexts", "prompt"
    )
    return spec


def choose_candidate_strengths(
    replica: VersionedModel, context: EditorContext, candidates: Sequence[CandidateEdit], baseline: Baseline
) -> Stepper[list[GuardResult]]:
    """Choose the strengths of candidates that are measured in one version. Return the guard's result of each at its
    strength."""

    def assess(i: int, _strength: float, result: GuardResult) -> Assessment:
        guard_enabled = candidates[i].resolved_edit.request.guard.enabled
        return Assessment(result.accepted or not guard_enabled, result.passed, result.effective)

    schedules = [baseline.strength_schedule(c.resolved_edit, replica.base).strengths for c in candidates]
    measure = partial(evaluate_candidates, replica, context, candidates, baseline)
    choices = yield from choose_strengths(schedules, measure, assess)
    return [choice.measurement for choice in choices]
