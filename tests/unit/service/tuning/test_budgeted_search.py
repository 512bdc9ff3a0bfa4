"""The rounds of a search with a time budget, with a fake objective and a fake clock: service.tuning.budgeted_search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from service.kit.steps import run_to_completion
from service.tuning.budgeted_search import UNBUDGETED, BudgetedSearch, chosen_candidate
from service.tuning.objective import Candidate
from service.tuning.race_schedule import round_sizes
from service.tuning.racing import Race
from service.tuning.search_space import RACE_START_VALUES, RACE_VALUES
from service.tuning.time_budget import TimeBudget, run_until_end
from tests.support.fake_trials import FakeClock, FakeTrials

LAYERS = (0, 2, 3, 5, 7, 9, 10, 12)
BEST: dict[str, Any] = {"layers": [3], "clamp": 1.0, "learning_rate": 0.1, "steps": 40, "contexts": 2}


def objective(hparams: dict[str, Any]) -> float:
    """Return the share of the best hyperparameters that a candidate has; a layer is the better the nearer it is."""
    near = 1 - float(abs(hparams["layers"][0] - BEST["layers"][0])) / 20
    return near * float(1 + sum(hparams[k] == v for k, v in BEST.items())) / (1 + len(BEST))


def run_search(
    seconds: float,
    facts: int = 16,
    stored: dict[str, int] | None = None,
    on_rung: Callable[[Race], None] = lambda _: None,
) -> tuple[BudgetedSearch, FakeTrials]:
    """Run a search in which one step of one fact takes a second."""
    clock = FakeClock()
    trials = FakeTrials(clock, objective, stored=stored)
    budget = TimeBudget(seconds, clock)
    search = BudgetedSearch(trials, LAYERS, facts, budget, on_rung)
    run_to_completion(run_until_end(search.execute(), budget))
    return search, trials


def test_best_candidate_is_found_on_all_facts() -> None:
    """With enough time the search runs all rounds and finds the best layer and values."""
    search, _ = run_search(math.inf)
    outcome = search.outcome
    assert outcome.best is not None and outcome.best.hparams == RACE_START_VALUES | BEST
    assert outcome.best_facts == outcome.complete_facts == 16
    assert search.is_complete and search.not_tried() == [UNBUDGETED]


def test_search_ends_with_its_budget() -> None:
    """The search takes at most one step longer than its budget, whatever the budget."""
    longest_step = max(values["steps"] for values in RACE_VALUES)
    for seconds in (1, 100, 1000, 3000, 10_000):
        _, trials = run_search(seconds)
        assert trials.clock.now <= seconds + longest_step


def test_budget_decides_only_where_the_search_ends() -> None:
    """What a search with a smaller budget measures is the beginning of what one with a greater budget does."""
    all_measured = run_search(math.inf)[1].measured
    for seconds in (100, 1000, 3000):
        measured = run_search(seconds)[1].measured
        assert 0 < len(measured) < len(all_measured)
        assert measured == all_measured[: len(measured)]


def test_leader_of_the_last_rung_is_the_best_before_a_race_is_complete() -> None:
    """A search that ends in its first race returns the best layer of the last complete rung, with start values."""
    search, _ = run_search(8 * 10 + 5)
    outcome = search.outcome
    assert outcome.best is not None and outcome.best.hparams == RACE_START_VALUES | {"layers": [3]}
    assert (outcome.best_facts, outcome.complete_facts) == (1, 0)
    phrases = search.not_tried()
    assert phrases[0] == "the rest of the round on 4 facts, from layer, rung 2 of 3 (2 facts) on"
    assert "any rate" in phrases[1] and phrases[-1] == UNBUDGETED


def test_search_without_a_complete_rung_has_no_best_candidate() -> None:
    """Before the first rung is complete there is nothing to compare."""
    assert run_search(8 * 10 - 11)[0].outcome.best is None


def test_winner_of_the_layers_is_the_best_before_the_first_round_is_complete() -> None:
    """Values that are measured on a part of the facts do not replace the winner of a complete race."""
    layer_race = 8 * 10 + 4 * 2 * 20 + 2 * 2 * 20
    search, trials = run_search(layer_race + 500)
    assert {stage for stage, _, _ in trials.calls} == {"layer", "values"}
    outcome = search.outcome
    assert outcome.best is not None and outcome.best.hparams == RACE_START_VALUES | {"layers": [3]}
    assert (outcome.best_facts, outcome.complete_facts) == (4, 0)


def test_round_that_does_not_fit_is_not_started() -> None:
    """A round whose estimate exceeds the time left is named with its estimate, and the recipe is that of the round
    before."""
    first_round = run_search(math.inf, facts=4)[1].clock.now
    search, trials = run_search(first_round + 100)
    outcome = search.outcome
    assert trials.clock.now == first_round and outcome.complete_facts == outcome.best_facts == 4
    assert search.not_tried()[0].startswith("a round on 8 facts, about ")
    assert not search.is_complete


def test_winner_of_the_last_complete_round_is_the_best() -> None:
    """A round that the budget cuts off, because it takes longer than was expected, changes nothing."""

    def slow_down_second_round(race: Race) -> None:
        assert isinstance(race.trials, FakeTrials)
        if not race.schedule.sizes_left:
            race.trials.seconds = 3.0

    expected = run_search(math.inf, facts=8)[1].clock.now
    search, _ = run_search(expected + 200, facts=8, on_rung=slow_down_second_round)
    outcome = search.outcome
    assert outcome.round_facts == 8 and outcome.complete_facts == outcome.best_facts == 4
    assert outcome.best is not None and outcome.best.hparams == RACE_START_VALUES | BEST
    assert search.not_tried()[0].startswith("the rest of the round on 8 facts, from ")


@pytest.mark.parametrize("seconds", [1, 85, 700, 2500])
def test_interrupted_search_continues_without_repeating(seconds: float) -> None:
    """A second run with the same store measures only what the first one did not, and finds the same."""
    uninterrupted, whole = run_search(math.inf)
    stored: dict[str, int] = {}
    _, first = run_search(seconds, stored=stored)
    resumed, second = run_search(math.inf, stored=stored)
    assert resumed.outcome.best == uninterrupted.outcome.best
    assert first.measured + second.measured == whole.measured


def test_time_left_is_estimated_after_the_first_measurement() -> None:
    """After each rung there is an estimate, and with a large budget it nears zero at the end."""
    estimates: list[float | None] = []
    search, trials = run_search(100_000, on_rung=lambda race: estimates.append(race.schedule.seconds_left()))
    rungs = 6 * len(round_sizes(16))
    assert len(estimates) == rungs and None not in estimates
    assert estimates[-1] == pytest.approx(0.0)
    first = estimates[0]
    assert first is not None and 0.5 < first / trials.clock.now < 2
    assert search.is_complete


def test_chosen_measurement_has_the_steps_of_the_recipe_if_there_is_one() -> None:
    """A candidate of the first rung was measured with fewer steps; one with all steps on the same facts comes first."""
    few = Candidate("layer", "rome", {"layers": [3], "steps": 10}, 0.4, edits=4)
    full = Candidate("layer", "rome", {"layers": [3], "steps": 20}, 0.5, edits=4)
    other = Candidate("layer", "rome", {"layers": [3], "steps": 20}, 0.6, edits=8)
    hparams = {"layers": [3], "steps": 20}
    assert chosen_candidate([few, full, other], hparams, 4) == full
    assert chosen_candidate([few, other], hparams, 4) == few
