"""How good edits are on a set of records: each alone on the base model, or one after another with all of them active.

Nothing is written to the ledger. What is expensive is kept as soon as it is known, under names that hold its place: an
evaluation that was interrupted goes on where it was, and comes to the same result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from service.covariance.corpus import Corpus
from service.datasets.record import Record, check_record_fits, target_object
from service.editing.context import EditInput, EditorContext
from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence
from service.engine.versioned_model import VersionedModel, WeightOverrides
from service.errors import InvalidInput
from service.evaluation.checkpointing import StageCache
from service.evaluation.metrics import Measures, RecordScores, change_scores, scoring_pairs, summarize
from service.kit.artifact_store import ArtifactStore
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.text import fill_prompt, normalize_whitespace
from service.models.score import TargetScore
from service.models.scoring import measure_drift, score_targets
from service.recipes.recipe import (
    Parameters,
    RomeParameters,
    StrengthSchedule,
    resolve_hparams,
    strength_schedule,
)
from service.schemas import EvaluationPlan, Sampling
from service.scores.text_metrics import TfIdf, fluency
from service.weights.composition import apply_delta, compose
from service.weights.factors import EditUpdate, deserialize_updates, serialize_updates

EDITS_PER_BATCH = 16  # edits that are found at once
RECORDS_PER_BATCH = 32  # records whose prompts are measured at once
RETENTION_AFTER = (10, 100)  # how many of the first edits are looked at again
DAMAGE_TEXTS = {"single": 16, "sequence": 200}  # plain texts
GENERATION_LENGTH = (
    100  # tokens of a generated text, those of its prompt included, and how it is drawn, as published
)
GENERATION_TOP_K = 5
GENERATION_BATCH_SIZE = 32  # texts generated side by side
NO_OVERRIDES: WeightOverrides = {}  # the weights of a model without edits
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def run_evaluation(
    replica: VersionedModel,
    context: EditorContext,
    plan: EvaluationPlan,
    records: Sequence[Record],
    store: ArtifactStore,
    damage_corpus: Corpus | None = None,
) -> Stepper[dict[str, Any]]:
    """Carry out a plan; the result is JSON. Damage is measured on `plain` texts, the toolkit's corpus when left out."""
    usable, left_out = split_evaluable_records(replica, plan, records)
    corpus = damage_corpus or context.corpus
    texts = texts_without_edited_facts(corpus.texts, usable)
    if plan.damage and not texts:
        raise InvalidInput(
            f"every text of {corpus.source} speaks of a fact that is edited: give other plain texts, or leave damage out.",
            "damage",
        )
    max_texts = plan.damage_texts or DAMAGE_TEXTS[plan.mode]
    evaluation = EvaluationRun(
        replica, context, plan, usable, store, texts[:: max(1, len(texts) // max_texts)][:max_texts]
    )
    results = yield from evaluation.execute()
    metadata = {
        "model": {"name": replica.base.name, "fingerprint": replica.base.fingerprint},
        "plan": plan.model_dump(mode="json"),
        "parameters": evaluation.parameters.model_dump(mode="json"),
        "records": {
            "measured": len(usable),
            "left_out": left_out,
            "lacking": dict(Counter(what for r in usable for what in r.missing_fields)),
        },
        "plain": {"source": corpus.source, "texts": len(evaluation.damage_texts)} if plan.damage else None,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return nonfinite_to_none(metadata | results)  # type: ignore[no-any-return]


def split_evaluable_records(
    replica: VersionedModel, plan: EvaluationPlan, records: Sequence[Record]
) -> tuple[list[Record], list[dict[str, str]]]:
    """The records that this model can be asked, and why the others cannot be."""
    usable: list[Record] = []
    left_out: list[dict[str, str]] = []
    tokenizer, positions = replica.base.tokenizer.backend_tokenizer, replica.base.max_positions
    for record in records:
        try:
            check_record_fits(record, plan.objective, tokenizer, positions)
        except InvalidInput as error:
            left_out.append({"record": record.name, "reason": error.detail})
        else:
            usable.append(record)
    if not usable:
        why = left_out[0]["reason"] if left_out else "there are none."
        raise InvalidInput(f"no record can be evaluated on this model: {why}", "records")
    return usable, left_out


def texts_without_edited_facts(texts: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The texts that do not speak of an edited fact: none that names a record's subject and its true object (or, where none
    is known, its subject)."""
    edited_facts = [(r.subject, r.target_true or r.subject) for r in records]
    return [t for t in texts if not any(subject in t and object_ in t for subject, object_ in edited_facts)]


def nonfinite_to_none(value: Any) -> Any:
    """As JSON has it: what is no finite number is nothing."""
    if isinstance(value, dict):
        return {k: nonfinite_to_none(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nonfinite_to_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EvaluationRun:
    """One evaluation of records that the model can be asked."""

    def __init__(
        self,
        replica: VersionedModel,
        context: EditorContext,
        plan: EvaluationPlan,
        records: Sequence[Record],
        store: ArtifactStore,
        damage_texts: Sequence[str],
    ) -> None:
        plan.check_consistency()
        self.replica, self.model, self.context, self.plan = replica, replica.base, context, plan
        self.records, self.damage_texts = records, damage_texts
        self.stages = StageCache(store)
        self.parameters: Parameters = resolve_hparams(
            context.recipe, plan.hparams, self.model.num_layers, plan.method
        )
        self.group_size = plan.batch_size or (EDITS_PER_BATCH if plan.search_model == "base" else 1)
        self.base_scores: list[RecordScores] = []
        self._tf_idf = TfIdf([t for r in records for t in r.reference_texts])

    def execute(self) -> Stepper[dict[str, Any]]:
        """Base, edits, and what they come to."""
        self.stages.bind_inputs(
            {
                "plan": self.plan.model_dump(mode="json"),
                "parameters": self.parameters.model_dump(mode="json"),
                "model": self.model.fingerprint,
                "corpus": self.context.corpus.digest,
                "records": [asdict(r) for r in self.records],
                "plain": self.damage_texts,
            }
        )
        yield from self._prepare_contexts_and_statistics()
        self.base_scores = yield from self._score_records("base", "measure the base", len(self.records), {})
        evaluate_mode = self._evaluate_each_alone if self.plan.mode == "single" else self._evaluate_sequence
        results = yield from evaluate_mode()
        return results | self._timing_summary()

    def _prepare_contexts_and_statistics(self) -> Stepper[None]:
        """Contexts and statistics are the base model's, whatever stands while edits are found."""
        if isinstance(self.parameters, RomeParameters):
            yield from self.context.get_contexts(self.parameters.contexts, self.parameters.seed)
            yield from self.context.get_statistics(self.parameters.layers)

    def _timing_summary(self) -> dict[str, Any]:
        """Seconds by what they were spent on, over all tries together, and edits per minute."""
        seconds = {kind: round(s, 3) for kind, s in self.stages.seconds.items()}
        find, measure = self.stages.seconds["find"], self.stages.seconds["measure"]
        rate = {"find": find, "find and measure": find + measure, "all": sum(self.stages.seconds.values())}
        minutes = {name: round(60 * len(self.records) / s, 2) for name, s in rate.items() if s > 0}
        return {"seconds": seconds, "edits_per_minute": minutes}

    # Each alone

    def _evaluate_each_alone(self) -> Stepper[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while len(rows) < len(self.records):
            groups, group_details = yield from self.find_group(len(rows) // self.group_size, {})
            for updates, details in zip(groups, group_details, strict=True):
                i = len(rows)
                progress = Progress(Phase.MEASURE, i, len(self.records), "each edit alone")
                rows.append(
                    (yield from report_as(self._evaluate_record_alone(i, updates), progress)) | details
                )
        parts = ("before", "after", "changes", "norm", *(["damage"] if self.plan.damage else []))
        return (
            {"damage": None}
            | (yield from self._summarize_parts(rows, parts))
            | {
                "strengthened": sum(r["strength"] != self.plan.strengths[0] for r in rows),
                "rows": rows,
            }
        )

    def _evaluate_record_alone(self, i: int, updates: list[EditUpdate]) -> Stepper[dict[str, Any]]:
        """The row of a record whose edit alone is active."""
        record = self.records[i]
        strength_scores = yield from self.stages.run_once(
            f"alone-{i:06}", "measure", self.choose_record_strength(record, [], updates)
        )
        scores = RecordScores.from_scores(record, [TargetScore(*s) for s in strength_scores["scores"]])
        weights = self.replica.compose_weights(p.scaled(strength_scores["strength"]) for p in updates)
        result_row = self._result_row(i, scores) | {
            "strength": strength_scores["strength"],
            "norm": relative_weight_changes(self.replica, weights),
        }
        if self.plan.damage:
            result_row["damage"] = yield from self.stages.run_once(
                f"damage-{i:06}", "damage", self._measure_damage(weights)
            )
        if self.plan.generation:
            for when, overrides in (("before", NO_OVERRIDES), ("after", weights)):
                result_row[when] |= yield from self._score_generated_texts(
                    f"written-{when}-{i:06}", record, overrides
                )
        return result_row

    def choose_record_strength(
        self, record: Record, others: Sequence[EditUpdate], updates: Sequence[EditUpdate]
    ) -> Stepper[dict[str, Any]]:
        """The first strength with which an edit takes beside the others, else the last; and the scores with it."""
        scores: list[TargetScore] = []
        strength = self.plan.strengths[0]
        schedule = self.strength_schedule_for(1)
        for strength in schedule.strengths:
            weights = self.replica.compose_weights([*others, *(p.scaled(strength) for p in updates)])
            yield Progress(Phase.COMPOSE, 1, 1)
            scores = yield from self.replica.step_with_weights(
                weights, score_targets(self.model, scoring_pairs(record))
            )
            if self.plan.objective != "write" or RecordScores.from_scores(record, scores).has_margin(
                schedule.required_margin(strength)
            ):
                break
        return {"strength": strength, "scores": scores}

    def strength_schedule_for(self, active: int) -> StrengthSchedule:
        """What is tried in turn when so many edits will be active."""
        return strength_schedule(self.parameters, self.plan.strengths, active, self.model.intermediate_size)

    # One after another

    def _evaluate_sequence(self) -> Stepper[dict[str, Any]]:
        composition = JointComposition(self) if self.plan.search_model == "base" else SequentialUpdates(self)
        tables: list[dict[str, Any]] = []
        record_scores: list[RecordScores] = []
        weights: WeightOverrides = {}
        for count in composition.checkpoints():
            weights = yield from composition.advance_to(count)
            previous_scores, detail = record_scores, f"{count} edits"
            record_scores = yield from self._score_records(f"after-{count:06}", detail, count, weights)
            tables.append(
                (yield from self._evaluate_checkpoint(count, weights, previous_scores, record_scores))
            )
        rows = [self._result_row(i, a) | composition.edit_details[i] for i, a in enumerate(record_scores)]
        if self.plan.generation:
            for i, result_row in enumerate(rows):
                progress, record = Progress(Phase.GENERATE, i, len(rows), "continuations"), self.records[i]
                for when, overrides in (("before", NO_OVERRIDES), ("after", weights)):
                    stepper = self._score_generated_texts(f"written-{when}-{i:06}", record, overrides)
                    result_row[when] |= yield from report_as(stepper, progress)
        last = tables[-1]
        return (yield from self._summarize_parts(rows, ("before", "after", "changes"))) | {
            "damage": last["damage"],
            "norm": last["norm"],
            "strengthened": sum(n["strength"] != self.plan.strengths[0] for n in composition.edit_details),
            "checkpoints": tables,
            "rows": rows,
        }

    def _evaluate_checkpoint(
        self,
        count: int,
        weights: WeightOverrides,
        previous_scores: Sequence[RecordScores],
        record_scores: Sequence[RecordScores],
    ) -> Stepper[dict[str, Any]]:
        """What there is to say of a model with so many edits."""
        damage = None
        if self.plan.damage:
            damage = yield from self.stages.run_once(
                f"damage-{count:06}", "damage", self._measure_damage(weights)
            )
        rows = [a.measures() for a in record_scores]
        held_before = [i for i, a in enumerate(previous_scores) if a.edit_holds]
        retention = []
        for first in sorted({*RETENTION_AFTER, len(previous_scores)}):
            if 0 < first < count:
                retention.append({"first": first} | (yield from self._summarize_measures(rows[:first])))
        return {
            "edits": count,
            "measures": (yield from self._summarize_measures(rows)),
            "changes": (
                yield from self._summarize_measures(
                    [self._change_scores(i, a) for i, a in enumerate(record_scores)]
                )
            ),
            "retention": retention,
            "still": {
                "held_before": len(held_before),
                "hold": sum(record_scores[i].edit_holds for i in held_before),
            },
            "damage": damage,
            "norm": relative_weight_changes(self.replica, weights),
        }

    # What both are made of

    def find_group(
        self, group_index: int, weights: WeightOverrides
    ) -> Stepper[tuple[list[list[EditUpdate]], list[dict[str, Any]]]]:
        """The pieces of some successive edits, found at once on the model with these weights, and how they were found."""
        first = group_index * self.group_size
        indices = range(first, min(first + self.group_size, len(self.records)))
        stepper = self.replica.step_with_weights(weights, self._find_and_store(indices))
        stage = self.stages.run_once(f"found-{group_index:06}", "find", stepper)
        details = yield from report_as(stage, Progress(Phase.FIND, first, len(self.records)))
        groups: list[list[EditUpdate]] = []
        for i in indices:
            data = self.stages.store.get(f"piece-{i:06}")
            assert data is not None
            groups.append(deserialize_updates(data, f"{i:06}", normalize_whitespace(self.records[i].subject)))
        return groups, details

    def _find_and_store(self, indices: Sequence[int]) -> Stepper[list[dict[str, Any]]]:
        """Find edits on the model as it stands and keep their pieces."""
        factors = yield from self.context.find_all_factors([self._edit_spec(i) for i in indices])
        for i, edit_factors in zip(indices, factors, strict=True):
            self.stages.store.put(f"piece-{i:06}", serialize_updates(edit_factors.updates))
        return [{"loss": f.losses[-1] if f.losses else None, "steps": len(f.losses)} for f in factors]

    def _edit_spec(self, i: int) -> EditInput:
        record, plan = self.records[i], self.plan
        statement, target = fill_prompt(record.prompt, record.subject), target_object(record, plan.objective)
        return EditInput(statement, target, plan.method, plan.hparams, f"{i:06}", plan.objective)

    def _score_records(
        self, name: str, detail: str, count: int, weights: WeightOverrides
    ) -> Stepper[list[RecordScores]]:
        """What the model says with these weights in place to the prompts of the first records, of many at once."""
        record_scores: list[RecordScores] = []
        for start in range(0, count, RECORDS_PER_BATCH):
            batch = self.records[start : min(start + RECORDS_PER_BATCH, count)]
            pairs = [pair for r in batch for pair in scoring_pairs(r)]
            stepper = self.replica.step_with_weights(weights, score_targets(self.model, pairs))
            stage = self.stages.run_once(f"{name}-{start:06}", "measure", stepper)
            scores = yield from report_as(stage, Progress(Phase.MEASURE, start, count, detail))
            score_iterator = iter(scores)
            record_scores += [
                RecordScores.from_scores(r, [TargetScore(*next(score_iterator)) for _ in scoring_pairs(r)])
                for r in batch
            ]
        return record_scores

    def _measure_damage(self, weights: WeightOverrides) -> Stepper[dict[str, float]]:
        """What the weights do to plain texts."""
        drift = yield from measure_drift(
            self.model, self.damage_texts, partial(self.replica.use_weights, weights)
        )
        return {
            "loss_before": drift.loss_before,
            "loss_after": drift.loss_after,
            "loss_rise": drift.loss_after / drift.loss_before - 1 if drift.loss_before else 0.0,
            "perplexity_before": _exp(drift.loss_before),
            "perplexity_after": _exp(drift.loss_after),
            "drift": drift.kl,
        }

    def _score_generated_texts(
        self, name: str, record: Record, weights: WeightOverrides
    ) -> Stepper[Measures]:
        """GE, and RS where there are reference texts, of what the model writes."""
        prompts = record.generation_prompts
        texts: list[str] = yield from self.stages.run_once(
            name,
            "write",
            self.replica.step_with_weights(weights, generate_texts(self.replica, prompts, self.plan.seed)),
        )
        return {"GE": fluency(texts), "RS": self._tf_idf.similarity(texts, record.reference_texts)}

    def _result_row(self, i: int, scores: RecordScores) -> dict[str, Any]:
        """What there is to say of one record."""
        r = self.records[i]
        return {
            "record": r.name,
            "subject": r.subject,
            "prompt": r.prompt,
            "target_new": r.target_new,
            "target_true": r.target_true,
            "relation": r.relation,
            "lacks": list(r.missing_fields),
            "before": self.base_scores[i].measures(),
            "after": scores.measures(),
            "changes": self._change_scores(i, scores),
        }

    def _change_scores(self, i: int, scores: RecordScores) -> Measures:
        return change_scores(self.base_scores[i], scores, self.plan.objective)

    def _summarize_parts(
        self, rows: Sequence[dict[str, Any]], parts: Sequence[str]
    ) -> Stepper[dict[str, Any]]:
        """Means over all records of some parts of their rows."""
        means = {}
        for part in parts:
            means[part] = yield from self._summarize_measures([r[part] for r in rows])
        return means

    def _summarize_measures(self, rows: Sequence[Measures]) -> Stepper[dict[str, Any]]:
        """Means over records with their intervals: a step of its own, since many draws take a while."""
        means = summarize(rows, self.plan.seed)
        yield Progress(Phase.SUMMARIZE, 1, 1)
        return means


class JointComposition:
    """Edits found on the base model, all active ones solved together, as the service does it: those that are found at once land at
    once, each with the first strength at which it takes beside the others."""

    def __init__(self, run: EvaluationRun) -> None:
        self.run = run
        self.edit_details: list[dict[str, Any]] = []  #: of the edits that have landed
        self._applied: list[EditUpdate] = []

    def checkpoints(self) -> list[int]:
        return _checkpoint_counts(self.run, 1)

    def advance_to(self, count: int) -> Stepper[WeightOverrides]:
        """The weights with so many edits. A company that a checkpoint cuts in two lands in two parts."""
        run = self.run
        while len(self.edit_details) < count:
            first = len(self.edit_details)
            group_index = first // run.group_size
            groups, group_details = yield from run.find_group(group_index, {})
            selected = slice(
                first - group_index * run.group_size,
                min(count, (group_index + 1) * run.group_size) - group_index * run.group_size,
            )
            stage = run.stages.run_once(
                f"landed-{first:06}-{count:06}", "land", self._choose_strengths(first, groups[selected])
            )
            strengths = yield from report_as(stage, Progress(Phase.STRENGTHEN, first, len(run.records)))
            for group, details, strength in zip(
                groups[selected], group_details[selected], strengths, strict=True
            ):
                self._applied += [p.scaled(strength) for p in group]
                self.edit_details.append(details | {"strength": strength})
        yield Progress(Phase.COMPOSE, count, count)
        return run.replica.compose_weights(self._applied)

    def _choose_strengths(self, first: int, groups: Sequence[list[EditUpdate]]) -> Stepper[list[float]]:
        """The strengths with which some edits take beside those before them and each other."""
        run = self.run
        schedule = run.strength_schedule_for(first + len(groups))
        if len(schedule.strengths) == 1 or run.plan.objective != "write":
            return [schedule.strengths[0]] * len(groups)
        records = run.records[first : first + len(groups)]
        return (yield from choose_group_strengths(run.replica, records, groups, self._applied, schedule))


def choose_group_strengths(
    replica: VersionedModel,
    records: Sequence[Record],
    groups: Sequence[Sequence[EditUpdate]],
    applied: Sequence[EditUpdate],
    schedule: StrengthSchedule,
) -> Stepper[list[float]]:
    """The first strength of each edit with which it takes beside those that have landed and the others: whoever does not is raised,
    all at once, until nobody can be."""
    strengths, levels = schedule.strengths, [0] * len(groups)
    rewrite_only = [replace(r, paraphrases=(), neighbours=()) for r in records]
    pairs = [pair for r in rewrite_only for pair in scoring_pairs(r)]
    while True:
        scaled_updates = [
            p.scaled(strengths[level]) for group, level in zip(groups, levels, strict=True) for p in group
        ]
        weights = replica.compose_weights([*applied, *scaled_updates])
        yield Progress(Phase.COMPOSE, 1, 1)
        scores = iter((yield from replica.step_with_weights(weights, score_targets(replica.base, pairs))))
        record_scores = [
            RecordScores.from_scores(r, [next(scores) for _ in scoring_pairs(r)]) for r in rewrite_only
        ]
        below_margin = [
            i
            for i, a in enumerate(record_scores)
            if not a.has_margin(schedule.required_margin(strengths[levels[i]]))
        ]
        raised = [i for i in below_margin if levels[i] + 1 < len(strengths)]
        if not raised:
            return [strengths[level] for level in levels]
        for i in raised:
            levels[i] += 1


class SequentialUpdates:
    """Edits found on the model as those before left it, and added to its weights, as published."""

    def __init__(self, run: EvaluationRun) -> None:
        self.run = run
        self.edit_details: list[dict[str, Any]] = []
        self._weights: WeightOverrides = {}

    def checkpoints(self) -> list[int]:
        return _checkpoint_counts(self.run, self.run.group_size)

    def advance_to(self, count: int) -> Stepper[WeightOverrides]:
        """The weights with so many edits."""
        run, strength = self.run, self.run.plan.strengths[0]
        while len(self.edit_details) < count:
            groups, group_details = yield from run.find_group(
                len(self.edit_details) // run.group_size, self._weights
            )
            self._weights = add_updates(
                run.replica, self._weights, [p.scaled(strength) for group in groups for p in group]
            )
            self.edit_details += [note | {"strength": strength} for note in group_details]
        return self._weights


def _checkpoint_counts(run: EvaluationRun, group_size: int) -> list[int]:
    """Those asked for, at the end of a company each, and the end."""
    total = len(run.records)
    ends = {math.ceil(c / group_size) * group_size for c in run.plan.checkpoints}
    return sorted({min(c, total) for c in ends if c < total + group_size} | {total})


def add_updates(
    replica: VersionedModel, weights: WeightOverrides, updates: Sequence[EditUpdate]
) -> WeightOverrides:
    """Weights with the change added that these pieces come to by themselves."""
    conv1d = replica.base.architecture.conv1d
    with replica.use_weights(weights) as model:
        updated = {
            s: apply_delta(model.parameter(s).data, change, conv1d) for s, change in compose(updates).items()
        }
    return {**weights, **updated}


def relative_weight_changes(replica: VersionedModel, weights: WeightOverrides) -> dict[str, float]:
    """|W - W0| / |W0| of every edited weight."""
    return {
        f"{site.layer}.{site.part}": _relative_distance(weights[site], replica.base.parameter(site).data)
        for site in sorted(weights)
    }


def _relative_distance(edited: Tensor, base: Tensor) -> float:
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return float(norm(edited.float() - base.float()) / norm(base))


def generate_texts(replica: VersionedModel, prompts: Sequence[str], seed: int) -> Stepper[list[str]]:
    """A text for each prompt, the prompt included, drawn from the most probable tokens with a seed."""
    model = replica.base
    texts: list[str] = []
    for start in range(0, len(prompts), GENERATION_BATCH_SIZE):
        batch_prompts = prompts[start : start + GENERATION_BATCH_SIZE]
        rows: list[DecodingSequence] = []
        for i, prompt in enumerate(batch_prompts, start):
            max_new_tokens = max(1, GENERATION_LENGTH - len(model.encode(prompt)[0]))
            rows.append(
                new_sequence(
                    model,
                    prompt,
                    Sampling(
                        max_new_tokens=max_new_tokens, temperature=1, top_k=GENERATION_TOP_K, seed=seed + i
                    ),
                )
            )
        batch = DecodingBatch(model, rows)
        while len(batch):
            batch.step()
            yield Progress(Phase.GENERATE, start, len(prompts))
        texts += [prompt + r.text for prompt, r in zip(batch_prompts, rows, strict=True)]
    return texts


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
