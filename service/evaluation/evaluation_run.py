"""The stages of an evaluation: scores of the base model, the edits in one of two modes, and the summary of their
measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from service.datasets.record import Record
from service.evaluation.checkpointing import ArtifactKind, StageKind
from service.evaluation.composition import JointComposition, SequenceComposition, SequentialUpdates
from service.evaluation.edit_search import FoundEdit, find_group
from service.evaluation.evaluation_context import EvaluationContext
from service.evaluation.measuring import (
    generate_texts,
    measure_damage,
    relative_weight_changes,
    score_pairs,
)
from service.evaluation.metrics import Measures, RecordScores, change_scores, split_scores, summarize
from service.evaluation.strengths import choose_strength_alone
from service.evaluation.suite_run import SuiteRun
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.methods.registry import get_method
from service.models.score import TargetScore
from service.models.scoring import score_targets
from service.patches.patch import BASE, PatchSet
from service.scores.text_metrics import TfIdf, fluency

RECORDS_PER_BATCH = 32  # records that are scored as one stage
RETENTION_AFTER = (10, 100)  # a checkpoint also measures the first 10 and the first 100 edits by themselves
AGE_GROUPS = 10  # parts of a sequence whose edits are measured by age
NO_EDITS = BASE  # the weights of a model without edits


class EvaluationRun:
    """The stages of one evaluation, and its result."""

    def __init__(self, evaluation: EvaluationContext) -> None:
        self.evaluation = evaluation
        self.replica, self.plan, self.records = evaluation.replica, evaluation.plan, evaluation.records
        self.stages = evaluation.stages
        self.base_scores: list[RecordScores] = []
        self.suites = SuiteRun(evaluation)
        self._tf_idf = TfIdf([t for r in self.records for t in r.reference_texts])

    def execute(self) -> Stepper[dict[str, Any]]:
        """Score the base model, evaluate the edits, and return the results."""
        evaluation = self.evaluation
        corpus = yield from evaluation.editor.get_corpus()
        self.stages.bind_inputs(
            {
                "plan": self.plan.model_dump(mode="json"),
                "parameters": evaluation.parameters.model_dump(mode="json"),
                "model": self.replica.base.fingerprint,
                "corpus": corpus.digest,
                "records": [asdict(r) for r in self.records],
                "damage_texts": evaluation.damage_texts,
            }
        )
        yield from self._prepare_contexts_and_statistics()
        self.base_scores = yield from self._score_records(
            ArtifactKind.SCORES_BEFORE, (), "base", len(self.records), NO_EDITS
        )
        yield from self.suites.prepare()
        evaluate_mode = self._evaluate_each_alone if self.plan.mode == "single" else self._evaluate_sequence
        results = yield from evaluate_mode()
        return results | self._timing_summary()

    def _prepare_contexts_and_statistics(self) -> Stepper[None]:
        """Compute contexts and statistics before any edit, so that they are those of the base model."""
        evaluation = self.evaluation
        method, parameters = get_method(evaluation.plan.method), evaluation.parameters
        yield from evaluation.editor.prepare_method(method.name, parameters)
        yield from evaluation.editor.get_statistics(method.statistics_layers(parameters))

    def _timing_summary(self) -> dict[str, Any]:
        """Return the seconds by kind of stage over all attempts, and the edits per minute."""
        seconds = self.stages.seconds
        find, measure = seconds[StageKind.FIND], seconds[StageKind.MEASURE]
        rates = {"find": find, "find_and_measure": find + measure, "total": sum(seconds.values())}
        return {
            "seconds": {kind.value: round(s, 3) for kind, s in seconds.items()},
            "edits_per_minute": {
                name: round(60 * len(self.records) / s, 2) for name, s in rates.items() if s > 0
            },
        }

    # Each edit alone

    def _evaluate_each_alone(self) -> Stepper[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while len(rows) < len(self.records):
            group = yield from find_group(self.evaluation, len(rows) // self.evaluation.batch_size, NO_EDITS)
            for edit in group:
                i = len(rows)
                progress = Progress(Phase.MEASURE, i, len(self.records), "each edit alone")
                row = yield from report_as(self._evaluate_record_alone(i, edit), progress)
                rows.append(row | edit.search)
        parts = ("before", "after", "changes", "norm", *(["damage"] if self.plan.damage else []))
        return (
            {"damage": None}
            | (yield from self._summarize_parts(rows, parts))
            | {"strengthened": self._count_strengthened(rows), "rows": rows}
        )

    def _evaluate_record_alone(self, i: int, edit: FoundEdit) -> Stepper[dict[str, Any]]:
        """Return the row of a record, with its edit alone active."""
        outcome = yield from self.stages.run_once(
            ArtifactKind.ALONE.name_of(i), StageKind.MEASURE, self._choose_strength_alone(i, edit)
        )
        record, strength = self.records[i], outcome["strength"]
        scores = RecordScores.from_scores(record, [TargetScore(*s) for s in outcome["scores"]])
        patch = yield from self.replica.compose_patch_in_steps(u.scaled(strength) for u in edit.updates)
        suite_measures = yield from self.suites.measure_alone(i, patch)
        row = self._result_row(i, scores, suite_measures) | {
            "strength": strength,
            "norm": relative_weight_changes(self.replica, patch),
        }
        if self.plan.damage:
            row["damage"] = yield from self._measure_damage(i, patch)
        if self.plan.generation:
            yield from self._add_text_measures(i, row, patch)
        return row

    def _choose_strength_alone(self, i: int, edit: FoundEdit) -> Stepper[dict[str, Any]]:
        """Return the strength of an edit that is active alone, and the scores at it."""
        schedule = self.evaluation.strength_schedule(1)
        if self.plan.objective != "write":
            schedule = replace(schedule, strengths=schedule.strengths[:1])
        choice = yield from choose_strength_alone(self.replica, self.records[i], edit.updates, schedule)
        return {"strength": choice.strength, "scores": [s.figures() for s in choice.measurement]}

    # A sequence of edits

    def _evaluate_sequence(self) -> Stepper[dict[str, Any]]:
        composition: SequenceComposition = (
            JointComposition(self.evaluation)
            if self.plan.search_model == "base"
            else SequentialUpdates(self.evaluation)
        )
        tables: list[dict[str, Any]] = []
        scores: list[RecordScores] = []
        suite_measures: list[Measures] = []
        patch = NO_EDITS
        for count in composition.checkpoints():
            patch = yield from composition.advance_to(count)
            previous_scores = scores
            scores = yield from self._score_records(
                ArtifactKind.SCORES_AFTER, (count,), f"{count} edits", count, patch
            )
            suite_measures = yield from self.suites.measure_first(count, patch)
            measures = [s.measures() | m for s, m in zip(scores, suite_measures, strict=True)]
            tables.append(
                (yield from self._evaluate_checkpoint(count, patch, previous_scores, scores, measures))
            )
        half = yield from self._measure_reverted_half(composition, scores)
        rows = [
            self._result_row(i, s, m) | composition.edit_details[i]
            for i, (s, m) in enumerate(zip(scores, suite_measures, strict=True))
        ]
        if self.plan.generation:
            for i, row in enumerate(rows):
                progress = Progress(Phase.GENERATE, i, len(rows), "continuations")
                yield from report_as(self._add_text_measures(i, row, patch), progress)
        last = tables[-1]
        return (yield from self._summarize_parts(rows, ("before", "after", "changes"))) | {
            "damage": last["damage"],
            "norm": last["norm"],
            "strengthened": self._count_strengthened(rows),
            "checkpoints": tables,
            "ages": (yield from self._measure_ages(rows)),
            "reverted_half": half,
            "rows": rows,
        }

    def _measure_ages(self, rows: Sequence[dict[str, Any]]) -> Stepper[list[dict[str, Any]]]:
        """Return the measures of the edits of each tenth of the sequence, the oldest first, with all of them active;
        nothing for a sequence of few edits."""
        if len(rows) < AGE_GROUPS:
            return []
        ages = []
        for group in range(AGE_GROUPS):
            first, last = (len(rows) * g // AGE_GROUPS for g in (group, group + 1))
            means = yield from self._summarize_measures([r["after"] for r in rows[first:last]])
            ages.append({"first": first + 1, "last": last, "measures": means})
        return ages

    def _measure_reverted_half(
        self, composition: SequenceComposition, scores: Sequence[RecordScores]
    ) -> Stepper[dict[str, Any] | None]:
        """Return the measures with every second edit reverted: of the edits that stay, and the share of reverted ones
        whose prompts have the probabilities of the base model again. None for few edits, and where edits cannot be
        reverted by themselves."""
        kept, reverted = range(0, len(scores), 2), range(1, len(scores), 2)
        patch = yield from composition.compose_only(kept)
        if patch is None or len(scores) < AGE_GROUPS:
            return None
        after = yield from self._score_records(
            ArtifactKind.SCORES_HALF, (len(scores),), "every second edit reverted", len(scores), patch
        )
        was_new = [i for i in reverted if not self.base_scores[i].edit_holds]
        return {
            "kept": (yield from self._summarize_measures([after[i].measures() for i in kept])),
            "reverted": len(reverted),
            "undone": sum(not after[i].edit_holds for i in was_new),
            "held_by_the_base": len(reverted) - len(was_new),
        }

    def _evaluate_checkpoint(
        self,
        count: int,
        patch: PatchSet,
        previous_scores: Sequence[RecordScores],
        scores: Sequence[RecordScores],
        rows: Sequence[Measures],
    ) -> Stepper[dict[str, Any]]:
        """Return the measures of the model with the first `count` edits active. `rows`: the measures of each record."""
        damage = (yield from self._measure_damage(count, patch)) if self.plan.damage else None
        held_before = [i for i, s in enumerate(previous_scores) if s.edit_holds]
        retention = []
        for first in sorted({*RETENTION_AFTER, len(previous_scores)}):
            if 0 < first < count:
                retention.append({"first": first} | (yield from self._summarize_measures(rows[:first])))
        changes = [self._change_scores(i, s) for i, s in enumerate(scores)]
        return {
            "edits": count,
            "measures": (yield from self._summarize_measures(rows)),
            "changes": (yield from self._summarize_measures(changes)),
            "retention": retention,
            "still_holding": {
                "held_before": len(held_before),
                "hold": sum(scores[i].edit_holds for i in held_before),
            },
            "damage": damage,
            "norm": relative_weight_changes(self.replica, patch),
            "recall": (yield from self._measure_recall(count, patch)) if self.plan.recall_facts else None,
        }

    def _measure_recall(self, count: int, patch: PatchSet) -> Stepper[dict[str, float]]:
        """Return the shares of facts that are not edited which the model says greedily, before and after, and the
        share of the known ones that it no longer says."""
        before = yield from self._known_facts(0, NO_EDITS)
        after = yield from self._known_facts(count, patch)
        known = [now for was, now in zip(before, after, strict=True) if was]
        return {
            "facts": len(before),
            "before": sum(before) / len(before),
            "after": sum(after) / len(after),
            "forgotten": 1 - sum(known) / len(known) if known else 0.0,
        }

    def _known_facts(self, count: int, patch: PatchSet) -> Stepper[list[bool]]:
        pairs = [(r.text, str(r.target_true)) for r in self.evaluation.other_facts]

        def score() -> Stepper[list[bool]]:
            scoring = score_targets(self.replica.base, pairs)
            return [s.is_greedy for s in (yield from self.replica.step_with_patch(patch, scoring))]

        known: list[bool] = yield from self.stages.run_once(
            ArtifactKind.RECALL.name_of(count), StageKind.MEASURE, score()
        )
        return known

    # Both modes

    def _score_records(
        self,
        kind: ArtifactKind,
        numbers: tuple[int, ...],
        detail: str,
        count: int,
        patch: PatchSet,
    ) -> Stepper[list[RecordScores]]:
        """Return the scores of the first `count` records, one stage for each batch of them."""
        record_scores: list[RecordScores] = []
        for start in range(0, count, RECORDS_PER_BATCH):
            batch = self.records[start : min(start + RECORDS_PER_BATCH, count)]
            stage = self.stages.run_once(
                kind.name_of(*numbers, start), StageKind.MEASURE, self._score_figures(batch, patch)
            )
            scores = yield from report_as(stage, Progress(Phase.MEASURE, start, count, detail))
            record_scores += split_scores(batch, [TargetScore(*s) for s in scores])
        return record_scores

    def _score_figures(
        self, records: Sequence[Record], patch: PatchSet
    ) -> Stepper[list[tuple[float, bool, int, int]]]:
        return [s.figures() for s in (yield from score_pairs(self.replica, records, patch))]

    def _measure_damage(self, number: int, patch: PatchSet) -> Stepper[dict[str, float]]:
        """Return the damage to plain texts, as a stage named by an edit or by a number of edits."""
        damage: dict[str, float] = yield from self.stages.run_once(
            ArtifactKind.DAMAGE.name_of(number),
            StageKind.DAMAGE,
            measure_damage(self.replica, self.evaluation.damage_texts, patch),
        )
        return damage

    def _add_text_measures(self, i: int, row: dict[str, Any], patch: PatchSet) -> Stepper[None]:
        """Add GE, and RS where there are reference texts, of texts generated before and after the edits."""
        record = self.records[i]
        for part, kind, overrides in (
            ("before", ArtifactKind.TEXTS_BEFORE, NO_EDITS),
            ("after", ArtifactKind.TEXTS_AFTER, patch),
        ):
            stepper = generate_texts(self.replica, record.generation_prompts, self.plan.seed)
            texts: list[str] = yield from self.stages.run_once(
                kind.name_of(i), StageKind.GENERATE, self.replica.step_with_patch(overrides, stepper)
            )
            row[part] |= {
                "GE": fluency(texts),
                "RS": self._tf_idf.similarity(texts, record.reference_texts),
            }

    def _result_row(self, i: int, scores: RecordScores, suite_measures: Measures) -> dict[str, Any]:
        """Return the row of one record."""
        r = self.records[i]
        return {
            "record": r.name,
            "subject": r.subject,
            "prompt": r.prompt,
            "target_new": r.target_new,
            "target_true": r.target_true,
            "relation": r.relation,
            "missing_fields": list(r.missing_fields),
            "before": self.base_scores[i].measures() | self.suites.base_measures(i),
            "after": scores.measures() | suite_measures,
            "changes": self._change_scores(i, scores),
        }

    def _count_strengthened(self, rows: Sequence[dict[str, Any]]) -> int:
        return sum(row["strength"] != self.plan.strengths[0] for row in rows)

    def _change_scores(self, i: int, scores: RecordScores) -> Measures:
        return change_scores(self.base_scores[i], scores, self.plan.objective)

    def _summarize_parts(
        self, rows: Sequence[dict[str, Any]], parts: Sequence[str]
    ) -> Stepper[dict[str, Any]]:
        """Return the means over all records of some parts of their rows."""
        means = {}
        for part in parts:
            means[part] = yield from self._summarize_measures([r[part] for r in rows])
        return means

    def _summarize_measures(self, rows: Sequence[Measures]) -> Stepper[dict[str, Any]]:
        """Return the means over records with intervals. Bootstrapping takes long enough to be a step of its own."""
        means = summarize(rows, self.plan.seed)
        yield Progress(Phase.SUMMARIZE, 1, 1)
        return means
