"""The search for a recipe within a limit of time, by rounds of successive halving.

A round is two races: one of single layers with the start values, then one of the values at the best layer. The first
round has few facts. Each further round repeats both races on more facts, and measures only what is new: the doubling
of Jamieson & Talwalkar (2016) for a budget that is not known beforehand, here because the seconds of a measurement are
not. The recipe is the winner of the last complete round; before there is one, of the last complete race, else of the
last complete rung.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from service.datasets.record import Record
from service.editing.context import EditorContext
from service.errors import InvalidInput
from service.kit.artifact_store import ArtifactStore
from service.kit.steps import Stepper
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.recipes.default import layers_to_try
from service.recipes.recipe import Recipe
from service.tuning import search_space
from service.tuning.fact_trials import FactTrials
from service.tuning.objective import Candidate
from service.tuning.race_schedule import RaceSchedule, round_sizes
from service.tuning.racing import Contender, Race, Rung, Trials, count_facts, plan_rungs, race_cost
from service.tuning.recipe_search import (
    NO_EDITABLE_LAYER,
    TuningResult,
    build_search_context,
    chat_values,
)
from service.tuning.search_space import JsonDict, Stage
from service.tuning.time_budget import TimeBudget, run_until_end

log = logging.getLogger(__name__)

#: what only a search without a time budget tries
UNBUDGETED = (
    "ranges of layers, weight decay, the texts of the key, the ridge, margins for many edits, the form of edits, "
    "other methods"
)
OnRung = Callable[[Race], None]


@dataclass
class Outcome:
    """What a search has found so far."""

    best: Contender | None = None
    best_facts: int = 0  #: on which the best candidate was measured
    complete_facts: int = 0  #: of the last complete round
    round_facts: int = 0  #: of the current round, 0 between rounds
    race: Race | None = None  #: the newest one


class BudgetedSearch:
    """The rounds of a search."""

    def __init__(
        self,
        trials: Trials,
        layers: Sequence[int],
        facts: int,
        budget: TimeBudget,
        on_rung: OnRung = lambda _: None,
        fixed_values: JsonDict | None = None,
    ) -> None:
        self.trials, self.budget, self._on_rung = trials, budget, on_rung
        self.start_values = search_space.RACE_START_VALUES | (fixed_values or {})
        self.layer_candidates: list[JsonDict] = [self.start_values | {"layers": [x]} for x in layers]
        sizes = round_sizes(facts)
        costs = {size: self._round_cost(size, before) for before, size in pairwise([0, *sizes])}
        self.schedule = RaceSchedule(costs, budget)
        self.outcome = Outcome()

    def execute(self) -> Stepper[None]:
        """Run all rounds that fit. `outcome` has the best candidate at any time."""
        while self.schedule.sizes_left and self.schedule.fits(self.schedule.sizes_left[0]):
            yield from self._run_round(self.schedule.sizes_left[0])

    @property
    def is_complete(self) -> bool:
        """Return whether all rounds are complete."""
        return not self.outcome.round_facts and not self.schedule.sizes_left

    def not_tried(self) -> list[str]:
        """Return what the search left out, as phrases."""
        outcome, phrases = self.outcome, []
        if outcome.round_facts:
            assert outcome.race is not None
            phrases.append(
                f"the rest of the round on {count_facts(outcome.round_facts)}, from {outcome.race.label} on"
            )
        if self.schedule.sizes_left and outcome.complete_facts:
            facts = self.schedule.sizes_left[0]
            seconds = self.schedule.seconds_of(facts) if not outcome.round_facts else None
            duration = "" if seconds is None else f", about {seconds / 60:.1f} min"
            phrases.append(f"a round on {count_facts(facts)}{duration}")
        elif not outcome.complete_facts and outcome.race is not None and outcome.race.stage == Stage.LAYER:
            phrases.append("any rate, number of steps, clamp and number of contexts but the start values")
        return [*phrases, UNBUDGETED]

    def _run_round(self, facts: int) -> Stepper[None]:
        outcome, before = self.outcome, self.outcome.complete_facts
        self.schedule.start_round(facts)
        outcome.round_facts = facts
        layer = yield from self._run_race(Stage.LAYER, self.layer_candidates, facts, before)
        values = [layer.hparams | change for change in search_space.RACE_VALUES]
        winner = yield from self._run_race(Stage.VALUES, values, facts, before)
        outcome.best, outcome.best_facts = winner, facts
        outcome.complete_facts, outcome.round_facts = facts, 0

    def _run_race(
        self, stage: Stage, candidates: Sequence[JsonDict], facts: int, before: int
    ) -> Stepper[Contender]:
        rungs = _plan_race(stage, len(candidates), facts, before)
        race = Race(stage, candidates, rungs, self.trials, self.schedule, self._after_rung)
        self.outcome.race = race
        winner = yield from race.execute()
        if winner.measured is not None and winner.measured.reason is not None:
            raise InvalidInput(NO_EDITABLE_LAYER, "facts")
        if not self.outcome.complete_facts:
            self.outcome.best, self.outcome.best_facts = winner, facts
        return winner

    def _after_rung(self, race: Race) -> None:
        outcome = self.outcome
        if not outcome.complete_facts and race.stage == Stage.LAYER:  # no race is complete
            outcome.best, outcome.best_facts = race.leader, race.rung.facts
        fields = {"detail": race.label, "leader": race.leader and race.leader.hparams}
        log.info("rung measured", extra=fields | {"seconds_left": self.schedule.seconds_left()})
        self._on_rung(race)

    def _round_cost(self, facts: int, before: int) -> float:
        values = [self.start_values | change for change in search_space.RACE_VALUES]
        races = ((Stage.LAYER, self.layer_candidates), (Stage.VALUES, values))
        return sum(
            race_cost(_plan_race(stage, len(candidates), facts, before), candidates, self.trials)
            for stage, candidates in races
        )


def _plan_race(stage: Stage, candidates: int, facts: int, before: int) -> list[Rung]:
    """Return the rungs of a race of a round. `before`: the facts of the round before it, 0 without one."""
    few_steps = stage == Stage.LAYER
    earlier = plan_rungs(candidates, before, few_steps) if before else []
    return plan_rungs(candidates, facts, few_steps, earlier)


def tune_within_budget(
    model: LoadedModel,
    context: EditorContext,
    records: Sequence[Record],
    plain_statements: Sequence[str],
    store: ArtifactStore,
    prepend_bos: bool,
    budget: TimeBudget,
    on_rung: OnRung = lambda _: None,
) -> Stepper[TuningResult | None]:
    """Return the best recipe that is found within the budget; None if it ended before any rung was complete.

    The context has the statistics of `layers_to_race`, or collects them when they are needed.
    """
    search = build_search_context(
        model, context, records, records, plain_statements, store, search_space.RACE_DAMAGE_TEXTS
    )
    layers = layers_to_race(model)
    history: list[Candidate] = []
    trials = FactTrials(search, budget.clock, history.append)
    race = BudgetedSearch(trials, layers, len(records), budget, on_rung, chat_values(model))
    yield from run_until_end(race.execute(), budget)
    best = race.outcome.best
    if best is None:
        return None
    if best.measured is None or best.measured.objective <= 0:
        raise InvalidInput(
            f"no candidate changes what the model says on {count_facts(race.outcome.best_facts)}: give more time, or facts with "
            "neighbours and paraphrases that the model knows.",
            "facts",
        )
    not_tried = race.not_tried()
    facts = race.outcome.best_facts
    figures = {
        "facts": facts,
        "minutes": budget.seconds / 60,
        "damage_texts": len(search.damage_texts),
        "corpus": context.corpus.source,
        "chosen": chosen_candidate(history, best.hparams, facts).to_json(),
        "not_tried": not_tried,
    }
    source = f"palimpsest tune --minutes {budget.seconds / 60:g}, on {facts} facts that the model knows"
    rome = RomeParameters.model_validate(best.hparams)
    recipe = Recipe(source=source, rome=rome, prepend_bos=prepend_bos, figures=figures)
    return TuningResult(recipe, history, tuple(not_tried), not race.is_complete)


def layers_to_race(model: LoadedModel) -> tuple[int, ...]:
    """Return the layers that a search with a time budget tries."""
    return layers_to_try(model.num_layers, search_space.RACE_LAYERS, 0.0)


def chosen_candidate(history: Sequence[Candidate], hparams: JsonDict, facts: int) -> Candidate:
    """Return the measurement by which a candidate was chosen. In the first rung it had fewer steps."""
    fitting = [c for c in history if c.edits == facts and c.hparams | {"steps": hparams["steps"]} == hparams]
    return max(fitting, key=lambda c: int(c.hparams["steps"]))
