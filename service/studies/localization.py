"""The localization study: whether causal tracing tells at which layer an edit succeeds (Hase et al. 2023).

Every known fact is traced, and edited at every layer, alone on the base model. Scores are stored under a digest of
their inputs, so that an interrupted study resumes, and an extended one computes only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from service.datasets.record import Record, record_fits, target_object
from service.editing.context import EditInput, EditorContext
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.evaluation.evaluation_context import EDITS_PER_BATCH
from service.evaluation.metrics import Measures, RecordScores, change_scores, scoring_pairs
from service.kit.artifact_store import ArtifactStore, content_addressed_name, get_json, put_json
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.text import fill_prompt
from service.models.score import TargetScore
from service.models.scoring import score_targets
from service.patches.patch import BASE, PatchSet
from service.recipes.recipe import resolve_hparams
from service.studies.edit_objectives import STUDY_OBJECTIVES, StudyObjective
from service.studies.facts import fact_from_record
from service.studies.known_facts import find_known_facts
from service.studies.localization_stats import analyze_runs, mean_effects_by_layer, trace_effects
from service.studies.noised_probes import noised_greedy_answer, score_under_noise, subject_noise
from service.studies.regression import scipy_stats
from service.studies.traces import TracePlan, load_or_trace, study_noise_level
from service.tracing.noise import NoiseLevel

WINDOW = 5  # layers whose MLP outputs are restored together (Hase et al. 2023)


@dataclass(frozen=True)
class LocalizationPlan:
    """The edits and the settings of the traces."""

    layers: tuple[int, ...]
    methods: tuple[str, ...] = ("rome",)
    problems: tuple[str, ...] = ("write",)  #: keys of STUDY_OBJECTIVES
    hparams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  #: by method
    samples: int = 10
    noise: float | str = "3sigma"
    seed: int = 1

    @property
    def trace(self) -> TracePlan:
        return TracePlan(("mlp",), WINDOW, self.samples, self.noise, False, self.seed)


def run_localization_study(
    replica: VersionedModel,
    context: EditorContext,
    plan: LocalizationPlan,
    records: Sequence[Record],
    store: ArtifactStore,
    limit: int | None = None,
) -> Stepper[dict[str, Any]]:
    """Carry out a plan on the records among the first `limit` whose fact the model knows.

    Returns JSON, and does not touch the ledger.
    """
    scipy_stats()  # fail before hours of tracing, not after
    candidates = [r for r in records if r.target_true]
    noise = study_noise_level(replica.base, plan.trace, [fact_from_record(r) for r in candidates])
    known_facts = yield from find_known_facts(replica.base, [fact_from_record(r) for r in candidates[:limit]])
    known_records = [
        candidates[i] for i in known_facts.indices if record_fits(candidates[i], replica.base.text_encoder)
    ]
    if not known_records:
        raise InvalidInput("the model knows none of the facts: give facts that it knows.", "facts")
    study = LocalizationStudy(replica, context, plan, known_records, store, noise)
    results = yield from study.execute()
    left_out = known_facts.left_out()
    left_out["unscorable"] += len(known_facts.indices) - len(known_records)
    return {
        "study": "localization",
        "model": {
            "name": replica.base.name,
            "fingerprint": replica.base.fingerprint,
            "layers": replica.base.num_layers,
        },
        "corpus": context.corpus.source,
        "scored": len(candidates[:limit]),
        "facts": len(known_records),
        "left_out": left_out,
        "noise": {
            "level": noise.value,
            "factor": noise.factor,
            "sigma": noise.sigma,
            "subjects": len(candidates),
        },
        "window": WINDOW,
        "samples": plan.samples,
        "seed": plan.seed,
        "layers": list(plan.layers),
        **results,
    }


class LocalizationStudy:
    """The traces and edits of known facts."""

    def __init__(
        self,
        replica: VersionedModel,
        context: EditorContext,
        plan: LocalizationPlan,
        records: Sequence[Record],
        store: ArtifactStore,
        noise: NoiseLevel,
    ) -> None:
        self.replica, self.model, self.context, self.plan = replica, replica.base, context, plan
        self.records, self.store, self.noise = records, store, noise
        self.hparams = {m: dict(plan.hparams.get(m, {})) for m in plan.methods}
        # raises InvalidInput for invalid hyperparameters before anything runs
        self.parameters = {m: self._resolve_parameters(m, plan.layers[0]) for m in plan.methods}

    def execute(self) -> Stepper[dict[str, Any]]:
        effects = yield from self._collect_trace_effects()
        studies = []
        for name in self.plan.problems:
            posed_records = yield from self._pose_problem(name)
            base_scores = yield from self._score_records(name, list(posed_records.values()), BASE)
            for method in self.plan.methods:
                runs = yield from self._edit_at_all_layers(
                    method, name, list(posed_records.values()), base_scores
                )
                about = {"method": method, "objective": name, "facts": len(posed_records)}
                scores = analyze_runs(runs, [effects[i] for i in posed_records], self.plan.layers)
                studies.append(about | {"parameters": self.parameters[method], "scores": scores})
        return {"effects": mean_effects_by_layer(effects), "studies": studies}

    def _pose_problem(self, name: str) -> Stepper[dict[int, Record]]:
        """Return the records of one problem by index.

        A reversal has those whose answer changes under noise to one that can be written.
        """
        if not STUDY_OBJECTIVES[name].reversed:
            return dict(enumerate(self.records))
        posed_records = {}
        for i, record in enumerate(self.records):
            yield Progress(Phase.PROBE, i, len(self.records), "under noise")
            answer = noised_greedy_answer(self.model, record, self._subject_noise(record)).strip()
            reversed_record = replace(record, target_new=answer)
            if (
                answer
                and answer != record.target_true
                and record_fits(reversed_record, self.model.text_encoder)
            ):
                posed_records[i] = reversed_record
        if not posed_records:
            raise InvalidInput("noise does not change the answer to any fact: use more noise.", "noise")
        return posed_records

    def _resolve_parameters(self, method: str, layer: int) -> dict[str, Any]:
        """Return the resolved hyperparameters of an edit at a layer."""
        hparams = self.hparams[method] | {"layers": [layer]}
        return resolve_hparams(self.context.recipe, hparams, self.model.num_layers, method).model_dump(
            mode="json"
        )

    def _collect_trace_effects(self) -> Stepper[list[dict[str, list[float]]]]:
        effects = []
        for i, record in enumerate(self.records):
            stepper = load_or_trace(
                self.model, fact_from_record(record), self.plan.trace, self.noise, self.store
            )
            trace = yield from report_as(stepper, Progress(Phase.TRACE, i, len(self.records)))
            effects.append(trace_effects(trace))
        return effects

    def _subject_noise(self, record: Record) -> Tensor:
        return subject_noise(self.model, record, self.noise, self.plan.seed)

    def _score_records(
        self, name: str, records: Sequence[Record], patch: PatchSet
    ) -> Stepper[list[RecordScores]]:
        """Return the scores of records with these weights, with the subject noised if the problem demands it."""
        record_scores = []
        for i, record in enumerate(records):
            if STUDY_OBJECTIVES[name].noised:
                scoring = score_under_noise(self.model, record, self._subject_noise(record))
            else:
                scoring = score_targets(self.model, scoring_pairs(record))
            progress = Progress(Phase.PROBE, i, len(records))
            scores = yield from report_as(self.replica.step_with_patch(patch, scoring), progress)
            record_scores.append(RecordScores.from_scores(record, [_nan_as_impossible(s) for s in scores]))
        return record_scores

    def _edit_at_all_layers(
        self, method: str, name: str, records: Sequence[Record], base_scores: Sequence[RecordScores]
    ) -> Stepper[list[list[Measures]]]:
        """Return the change scores of one kind of edit, by fact and layer."""
        total = len(self.plan.layers) * len(records)
        runs: list[list[Measures]] = [[] for _ in records]
        for layer in self.plan.layers:
            for start in range(0, len(records), EDITS_PER_BATCH):
                progress = Progress(Phase.EDIT, sum(map(len, runs)), total, f"{method}, {name}")
                batch = slice(start, start + EDITS_PER_BATCH)
                stepper = self._edit_batch(method, name, layer, records[batch], base_scores[batch])
                batch_scores = yield from report_as(stepper, progress)
                for fact_runs, scores in zip(runs[batch], batch_scores, strict=True):
                    fact_runs.append(scores)
        return runs

    def _edit_batch(
        self,
        method: str,
        name: str,
        layer: int,
        records: Sequence[Record],
        base_scores: Sequence[RecordScores],
    ) -> Stepper[list[Measures]]:
        """Return the change scores of some facts' edits at one layer.

        Those that are not stored are searched as one batch.
        """
        parameters, problem = self._resolve_parameters(method, layer), STUDY_OBJECTIVES[name]
        names = [self._artifact_name(record, method, name, parameters) for record in records]
        missing = [i for i, artifact in enumerate(names) if self.store.get(artifact) is None]
        inputs = [self._edit_input(records[i], method, problem, layer) for i in missing]
        factors = (yield from self.context.find_all_factors(inputs)) if inputs else []
        for i, edit_factors in zip(missing, factors, strict=True):
            patch = yield from self.replica.compose_patch_in_steps(edit_factors.updates)
            (edited_scores,) = yield from self._score_records(name, [records[i]], patch)
            put_json(self.store, names[i], change_scores(base_scores[i], edited_scores, problem.objective))
        return [get_json(self.store, artifact) for artifact in names]

    def _edit_input(self, record: Record, method: str, problem: StudyObjective, layer: int) -> EditInput:
        return EditInput(
            fill_prompt(record.prompt, record.subject),
            target_object(record, problem.objective),
            method,
            self.hparams[method] | {"layers": [layer]},
            objective=problem.objective,
            noise=self._subject_noise(record) if problem.noised else None,
        )

    def _artifact_name(self, record: Record, method: str, name: str, parameters: Mapping[str, Any]) -> str:
        tools = {"model": self.model.fingerprint, "corpus": self.context.corpus.digest}
        noise = (self.noise.value, self.plan.seed) if STUDY_OBJECTIVES[name].noised else None
        inputs = [tools, asdict(record), method, name, parameters, noise]
        return content_addressed_name("edit", inputs)


def _nan_as_impossible(score: TargetScore) -> TargetScore:
    """Return the score with probability 0 in place of NaN, which a model with non-finite outputs gives."""
    return score._replace(log_p=-math.inf) if math.isnan(score.log_p) else score
