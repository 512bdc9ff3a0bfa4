"""Every fact edited at every layer, and traced: does the trace say where an edit succeeds? (Hase et al. 2023; methods F)

Each edit stands alone on the base model, is measured and thrown away; what is kept are its scores, under a name that holds all
that they depend on. So a study that was interrupted goes on, and one that is widened computes what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from service.datasets.records import Record, check_askable, wanted_object
from service.editing.context import Asking, Toolkit
from service.engine.versioned_model import Replica, Weights
from service.errors import InvalidInput
from service.evaluation.metrics import Answers, Measures, ask, changes
from service.kit.artifact_store import Kept, get_json, put_json
from service.kit.steps import Progress, Steps, within
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.models.score import Score
from service.models.scoring import score_steps
from service.recipes.recipe import resolve
from service.studies.edit_objectives import PROBLEMS, Problem
from service.studies.facts import fact_of
from service.studies.known_facts import known_steps, run_name
from service.studies.localization_stats import by_layer, conclude, effects_of
from service.studies.noised_probes import noise_of, noised_answer, noised_score_steps
from service.studies.traces import TracePlan, level_of, stored_trace_steps
from service.tracing.noise import Level

WINDOW = 5  # layers of MLP outputs put back together (methods F.3)
SIDE_BY_SIDE = 16  # edits that are found at once


@dataclass(frozen=True)
class LocalizationPlan:
    """Which edits, and how facts are traced."""

    layers: tuple[int, ...]
    methods: tuple[str, ...] = ("rome",)
    problems: tuple[str, ...] = ("write",)  #: of PROBLEMS
    hparams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  #: by method
    samples: int = 10
    noise: float | str = "3sigma"
    seed: int = 1

    @property
    def trace(self) -> TracePlan:
        return TracePlan(("mlp",), WINDOW, self.samples, self.noise, False, self.seed)


def localization_steps(
    replica: Replica,
    toolkit: Toolkit,
    plan: LocalizationPlan,
    records: Sequence[Record],
    kept: Kept,
    limit: int | None = None,
) -> Steps[dict[str, Any]]:
    """Carry out a plan on those of the first `limit` records whose fact the model knows. JSON-able; no ledger is touched."""
    named = [r for r in records if r.target_true]
    noise = level_of(replica.base, plan.trace, [fact_of(r) for r in named])
    asked = yield from known_steps(replica.base, [fact_of(r) for r in named[:limit]])
    known = [r for r in (named[i] for i in asked.known) if _can_be_written(replica.base, r)]
    if not known:
        raise InvalidInput("none of the facts is known to the model: there is nothing to edit.", "facts")
    study = Localization(replica, toolkit, plan, known, kept, noise)
    found = yield from study.steps()
    left_out = asked.left_out()
    left_out["cannot be asked"] += len(asked.known) - len(known)
    return {
        "study": "localization",
        "model": {
            "name": replica.base.name,
            "fingerprint": replica.base.fingerprint,
            "layers": replica.base.layers,
        },
        "corpus": toolkit.corpus.source,
        "asked": len(named[:limit]),
        "facts": len(known),
        "left_out": left_out,
        "noise": {"level": noise.value, "factor": noise.factor, "sigma": noise.sigma, "subjects": len(named)},
        "window": WINDOW,
        "samples": plan.samples,
        "seed": plan.seed,
        "layers": list(plan.layers),
        **found,
    }


def _can_be_written(model: LoadedModel, record: Record) -> bool:
    try:
        check_askable(record, "write", model.tokenizer.backend_tokenizer, model.positions)
    except InvalidInput:
        return False
    return True


class Localization:
    """The traces and edits of known facts."""

    def __init__(
        self,
        replica: Replica,
        toolkit: Toolkit,
        plan: LocalizationPlan,
        records: Sequence[Record],
        kept: Kept,
        noise: Level,
    ) -> None:
        self.replica, self.model, self.toolkit, self.plan = replica, replica.base, toolkit, plan
        self.records, self.kept, self.noise = records, kept, noise
        self.hparams = {m: dict(plan.hparams.get(m, {})) for m in plan.methods}
        # what cannot be is refused before anything runs
        self.parameters = {m: self._parameters(m, plan.layers[0]) for m in plan.methods}

    def steps(self) -> Steps[dict[str, Any]]:
        effects = yield from self._effects_steps()
        studies = []
        for name in self.plan.problems:
            posed = yield from self._posed_steps(name)
            before = yield from self._answers_steps(name, list(posed.values()), {})
            for method in self.plan.methods:
                runs = yield from self._runs_steps(method, name, list(posed.values()), before)
                about = {"method": method, "objective": name, "facts": len(posed)}
                scores = conclude(runs, [effects[i] for i in posed], self.plan.layers)
                studies.append(about | {"parameters": self.parameters[method], "scores": scores})
        return {"effects": by_layer(effects), "studies": studies}

    def _posed_steps(self, name: str) -> Steps[dict[int, Record]]:
        """The facts of one problem by their places. In a reversal those whose object noise changes to one that can be written."""
        if not PROBLEMS[name].reversed:
            return dict(enumerate(self.records))
        posed = {}
        for i, record in enumerate(self.records):
            yield Progress("ask under noise", i, len(self.records))
            said = noised_answer(self.model, record, self._noise(record)).strip()
            turned = replace(record, target_new=said)
            if said and said != record.target_true and _can_be_written(self.model, turned):
                posed[i] = turned
        if not posed:
            raise InvalidInput("under noise the model says what it says without: use more noise.", "noise")
        return posed

    def _parameters(self, method: str, layer: int) -> dict[str, Any]:
        """What an edit at a layer is made with."""
        asked = self.hparams[method] | {"layers": [layer]}
        return resolve(self.toolkit.recipe, asked, self.model.layers, method).model_dump(mode="json")

    def _effects_steps(self) -> Steps[list[dict[str, list[float]]]]:
        found = []
        for i, record in enumerate(self.records):
            steps = stored_trace_steps(self.model, fact_of(record), self.plan.trace, self.noise, self.kept)
            trace = yield from within(steps, Progress("trace", i, len(self.records)))
            found.append(effects_of(trace))
        return found

    def _noise(self, record: Record) -> Tensor:
        return noise_of(self.model, record, self.noise, self.plan.seed)

    def _answers_steps(self, name: str, records: Sequence[Record], weights: Weights) -> Steps[list[Answers]]:
        """What the model says to the prompts of records with these weights in place, the subject noised where the problem is."""
        found = []
        for i, record in enumerate(records):
            if PROBLEMS[name].noised:
                asking = noised_score_steps(self.model, record, self._noise(record))
            else:
                asking = score_steps(self.model, ask(record))
            progress = Progress("ask", i, len(records))
            scores = yield from within(self.replica.standing(weights, asking), progress)
            found.append(Answers.of(record, [_sound(s) for s in scores]))
        return found

    def _runs_steps(
        self, method: str, name: str, records: Sequence[Record], before: Sequence[Answers]
    ) -> Steps[list[list[Measures]]]:
        """The scores of one kind of edit, by fact and layer."""
        total = len(self.plan.layers) * len(records)
        runs: list[list[Measures]] = [[] for _ in records]
        for layer in self.plan.layers:
            for at in range(0, len(records), SIDE_BY_SIDE):
                now = Progress(f"{method}, {name}", sum(map(len, runs)), total)
                some = slice(at, at + SIDE_BY_SIDE)
                steps = self._company_steps(method, name, layer, records[some], before[some])
                found = yield from within(steps, now)
                for of_fact, scores in zip(runs[some], found, strict=True):
                    of_fact.append(scores)
        return runs

    def _company_steps(
        self, method: str, name: str, layer: int, records: Sequence[Record], before: Sequence[Answers]
    ) -> Steps[list[Measures]]:
        """The scores of some facts' edits at one layer: what is kept of them, and the others found side by side."""
        parameters, problem = self._parameters(method, layer), PROBLEMS[name]
        names = [self._name(record, method, name, parameters) for record in records]
        known: dict[int, Measures] = {}
        for i, run in enumerate(names):
            if (scores := get_json(self.kept, run)) is not None:
                known[i] = scores
        missing = [i for i in range(len(records)) if i not in known]
        wishes = [self._asking(records[i], method, problem, layer) for i in missing]
        found = (yield from self.toolkit.find_together_steps(wishes)) if wishes else []
        for i, one in zip(missing, found, strict=True):
            weights = self.replica.composed(one.pieces)
            (after,) = yield from self._answers_steps(name, [records[i]], weights)
            known[i] = changes(before[i], after, problem.objective)
            put_json(self.kept, names[i], known[i])
        return [known[i] for i in range(len(records))]

    def _asking(self, record: Record, method: str, problem: Problem, layer: int) -> Asking:
        return Asking(
            fill(record.prompt, record.subject),
            wanted_object(record, problem.objective),
            method,
            self.hparams[method] | {"layers": [layer]},
            objective=problem.objective,
            noise=self._noise(record) if problem.noised else None,
        )

    def _name(self, record: Record, method: str, name: str, parameters: Mapping[str, Any]) -> str:
        tools = {"model": self.model.fingerprint, "corpus": self.toolkit.corpus.digest}
        noise = (self.noise.value, self.plan.seed) if PROBLEMS[name].noised else None
        return run_name("edit", tools, asdict(record), method, name, parameters, noise)


def _sound(score: Score) -> Score:
    """A model that an edit has broken so that it gives no number says nothing."""
    return score._replace(log_p=-math.inf) if math.isnan(score.log_p) else score
