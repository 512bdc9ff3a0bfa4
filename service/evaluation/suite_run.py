"""The suites of an evaluation: the answers of the base model and of versions to their questions, and the measures."""

from __future__ import annotations

from collections.abc import Sequence

from service.datasets.record import Record, true_statements
from service.errors import InvalidInput
from service.evaluation.checkpointing import ArtifactKind, StageKind
from service.evaluation.evaluation_context import EvaluationContext
from service.evaluation.metrics import Measures
from service.evaluation.suites.answers import answer_questions
from service.evaluation.suites.prefixes import PREFIX_SEED, PREFIXES
from service.evaluation.suites.question import Answers, Question, answer_json, read_answer
from service.evaluation.suites.registry import SUITES
from service.evaluation.suites.suite import SuiteInputs
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.patches.patch import BASE, PatchSet

RECORDS_PER_STAGE = 8  # records whose answers are stored together


class SuiteRun:
    """The suites of a plan on the records of an evaluation. Without suites it asks and measures nothing."""

    def __init__(self, evaluation: EvaluationContext) -> None:
        self.evaluation = evaluation
        self.suites = [SUITES[name] for name in dict.fromkeys(evaluation.plan.suites)]
        self.inputs = SuiteInputs()
        self._base_answers: list[Answers] = []

    def prepare(self) -> Stepper[None]:
        """Ask the base model. Raise InvalidInput for a suite that this model cannot answer."""
        if not self.suites:
            return
        model, records = self.evaluation.replica.base, self.evaluation.records
        needs_chat = [s.name for s in self.suites if s.needs_chat]
        if needs_chat and model.chat_format is None:
            raise InvalidInput(
                f"the suite {needs_chat[0]!r} needs a model with a chat template: leave it out.", "suites"
            )
        prefixes: list[str] = []
        if any(s.needs_prefixes for s in self.suites):
            seed = self.evaluation.plan.seed + PREFIX_SEED
            prefixes = yield from self.evaluation.editor.get_contexts(PREFIXES, seed)
        statements = {r.subject: true_statements([r])[0] for r in records if r.target_true and not r.messages}
        self.inputs = SuiteInputs(tuple(prefixes), statements, model.chat_format)
        self._base_answers = yield from self._answers(ArtifactKind.ANSWERS_BEFORE, (), 0, len(records), BASE)

    def base_measures(self, number: int) -> Measures:
        """Return the measures of the base model for a record."""
        if not self.suites:
            return {}
        answers = self._base_answers[number]
        return self._measure(number, answers)

    def measure_alone(self, number: int, patch: PatchSet) -> Stepper[Measures]:
        """Return the measures of a record with its edit alone active."""
        (measures,) = yield from self._measures((number,), number, number + 1, patch)
        return measures

    def measure_first(self, count: int, patch: PatchSet) -> Stepper[list[Measures]]:
        """Return the measures of the first records with their edits active."""
        return (yield from self._measures((count,), 0, count, patch))

    def _measures(
        self, numbers: tuple[int, ...], start: int, end: int, patch: PatchSet
    ) -> Stepper[list[Measures]]:
        if not self.suites:
            return [{} for _ in range(start, end)]
        answers = yield from self._answers(ArtifactKind.ANSWERS_AFTER, numbers, start, end, patch)
        return [self._measure(start + i, own) for i, own in enumerate(answers)]

    def _measure(self, number: int, answers: Answers) -> Measures:
        record, base = self.evaluation.records[number], self._base_answers[number]
        measures: Measures = {}
        for suite in self.suites:
            measures |= suite.measure(record, self.inputs, answers, base)
        return measures

    def _answers(
        self, kind: ArtifactKind, numbers: tuple[int, ...], start: int, end: int, patch: PatchSet
    ) -> Stepper[list[Answers]]:
        """Return the answers about some records, one stage for each batch of them."""
        records, found = self.evaluation.records, list[Answers]()
        for first in range(start, end, RECORDS_PER_STAGE):
            batch = [self._questions(r) for r in records[first : min(first + RECORDS_PER_STAGE, end)]]
            stage = self.evaluation.stages.run_once(
                kind.name_of(*numbers, first), StageKind.ASK, self._answer_json(batch, patch)
            )
            progress = Progress(Phase.ANSWER, first - start, end - start, "suites")
            values = iter((yield from report_as(stage, progress)))
            found += [{q: read_answer(q, next(values)) for q in questions} for questions in batch]
        return found

    def _questions(self, record: Record) -> list[Question]:
        """Return the questions of all suites about a record, each once."""
        return list(dict.fromkeys(q for suite in self.suites for q in suite.questions(record, self.inputs)))

    def _answer_json(self, batch: Sequence[Sequence[Question]], patch: PatchSet) -> Stepper[list[object]]:
        questions = [q for questions in batch for q in questions]
        answers = yield from answer_questions(self.evaluation.replica, questions, patch)
        return [answer_json(answers[q]) for q in questions]
