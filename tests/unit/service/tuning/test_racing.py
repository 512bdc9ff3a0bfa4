"""Successive halving: service.tuning.racing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from service.kit.steps import run_to_completion
from service.tuning.race_schedule import RaceSchedule
from service.tuning.racing import Contender, Measurement, Race, Rung, plan_rungs, race_cost
from service.tuning.time_budget import TimeBudget
from tests.support.fake_trials import FakeClock, FakeTrials


def run_race(trials: FakeTrials, candidates: list[dict[str, Any]], facts: int = 8) -> Race:
    """Run a race on some facts with few steps first."""
    schedule = RaceSchedule({facts: 1.0}, TimeBudget(math.inf, trials.clock))
    schedule.start_round(facts)
    rungs = plan_rungs(len(candidates), facts, few_steps=True)
    race = Race("layer", candidates, rungs, trials, schedule)
    run_to_completion(race.execute())
    return race


def test_candidates_are_halved_and_facts_are_doubled() -> None:
    """Each rung has half of the candidates of the one before on twice as many facts, and the last one all facts."""
    rungs = plan_rungs(12, 8)
    assert [(r.candidates, r.facts, r.new_facts) for r in rungs] == [(12, 2, 24), (6, 4, 12), (3, 8, 12)]
    assert [(r.candidates, r.facts) for r in plan_rungs(3, 5)] == [(3, 3), (2, 5)]


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_race_of_few_candidates_uses_all_facts_and_steps(candidates: int) -> None:
    """One or two candidates need no rung before the last one."""
    assert plan_rungs(candidates, 4, few_steps=True) == [Rung(candidates, 4, 1.0, 4 * candidates)]


def test_few_steps_come_first() -> None:
    """The first rung has half of the steps, so that the second one measures its facts anew."""
    rungs = plan_rungs(8, 8, few_steps=True)
    assert [r.steps_share for r in rungs] == [0.5, 1.0, 1.0]
    assert [r.new_facts for r in rungs] == [8 * 2, 4 * 4, 2 * 4]
    assert rungs[0].hparams_of({"steps": 25, "clamp": 1}) == {"steps": 12, "clamp": 1}
    assert rungs[0].hparams_of({"steps": 1}) == {"steps": 1}


def test_facts_of_an_earlier_race_are_not_counted_again() -> None:
    """A race on more facts needs only those that the race before it did not measure: of its survivors all."""
    rungs = plan_rungs(12, 16, earlier=plan_rungs(12, 8))
    assert [r.new_facts for r in rungs] == [6 * 2, 3 * 4, 3 * 8]
    trials = FakeTrials(FakeClock(), lambda _: 1.0)
    assert race_cost(rungs, [{"steps": 1}, {"steps": 3}], trials) == 2 * (12 + 12 + 24)


def test_better_half_is_measured_on_more_facts() -> None:
    """The candidates of a rung are the best ones of the rung before, and the leader is the best of the last rung."""
    candidates = [{"layers": [x], "steps": 20} for x in range(8)]
    trials = FakeTrials(FakeClock(), lambda h: 1 - abs(h["layers"][0] - 3) / 10)
    race = run_race(trials, candidates)
    measured = [(h["layers"][0], h["steps"], facts) for _, h, facts in trials.calls]
    assert measured[:8] == [(x, 10, 2) for x in range(8)]
    assert measured[8:] == [(3, 20, 4), (2, 20, 4), (4, 20, 4), (1, 20, 4), (3, 20, 8), (2, 20, 8)]
    assert race.leader is not None and race.leader.hparams == candidates[3]


def test_stored_facts_are_not_measured_again() -> None:
    """Each candidate is measured once on each fact."""
    trials = FakeTrials(FakeClock(), lambda h: h["layers"][0])
    run_race(trials, [{"layers": [x], "steps": 20} for x in range(8)])
    assert len(set(trials.measured)) == len(trials.measured) == 8 * 2 + 4 * 4 + 2 * 4


def test_equal_objectives_are_decided_by_margin_then_cost_then_order() -> None:
    """Between candidates of one objective the greater margin wins, then the smaller cost, then the first one."""

    def contender(number: int, cost: float, objective: float, margin: float) -> Contender:
        return Contender(number, {}, cost, Measurement(objective, margin, 1.0))

    ranked = [
        contender(4, 9.0, 0.9, -1.0),
        contender(3, 9.0, 0.5, 0.4),
        contender(2, 1.0, 0.5, 0.3),
        contender(0, 2.0, 0.5, 0.3),
        contender(1, 2.0, 0.5, 0.3),
        Contender(5, {}, 0.0, Measurement(0.0, -math.inf, 0.0, "no statistics")),
    ]
    shuffled = ranked[::-1]
    assert sorted(shuffled, key=lambda c: c.rank) == ranked


def test_label_counts_the_rungs() -> None:
    """The label of a race names stage, rung and facts."""
    race = run_race(FakeTrials(FakeClock(), lambda _: 1.0), [{"steps": 1}], facts=1)
    assert race.label == "layer, rung 1 of 1 (1 fact)"
