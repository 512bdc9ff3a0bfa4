"""Successive halving: many candidates are measured on few facts, and the better half of them on twice as many
(Jamieson & Talwalkar 2016). Torch-free.

All candidates of a rung are measured on the same facts, the first ones in one fixed order, so that the facts that a
candidate needs in the next rung, or in a later race on more facts, include those that it was measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from service.kit.steps import Phase, Progress, Stepper, report_as
from service.tuning.race_schedule import RaceSchedule

MAX_RUNGS = 3
FEW_STEPS_SHARE = 0.5  # of the optimization steps, in a rung with few steps


class Measurement(NamedTuple):
    """What decides between two candidates."""

    objective: float
    margin: float  #: the mean difference of the probabilities of both objects; it decides between equal objectives
    seconds: float  #: that the measurement took, when it was made
    reason: str | None = None  #: why the candidate cannot be carried out


class Trials(Protocol):
    """Measures candidates. Candidates are sets of hyperparameters."""

    def cost(self, hparams: dict[str, Any], facts: int, new_facts: float) -> float:
        """Return how much work a measurement on some facts is, of which some are not stored yet, relative to other
        measurements."""

    def measure(self, stage: str, hparams: dict[str, Any], facts: int) -> Stepper[Measurement]:
        """Measure a candidate on the first facts."""


@dataclass(frozen=True)
class Rung:
    """Candidates that are measured on the same facts."""

    candidates: int
    facts: int
    steps_share: float = 1.0  #: of the optimization steps of a candidate
    new_facts: int = 0  #: of all candidates together, without those of the rungs before it

    def hparams_of(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters with which a candidate is measured."""
        if self.steps_share == 1:
            return candidate
        return candidate | {"steps": max(1, round(self.steps_share * candidate["steps"]))}

    def with_new_facts(self, before: Sequence[Rung]) -> Rung:
        """Return the rung with the number of new facts, if the same candidates are the better ones in all rungs."""
        same_steps = [r for r in before if r.steps_share == self.steps_share]
        new = [
            self.facts - max([r.facts for r in same_steps if place < r.candidates], default=0)
            for place in range(self.candidates)
        ]
        return replace(self, new_facts=sum(max(0, n) for n in new))


def plan_rungs(
    candidates: int, facts: int, few_steps: bool = False, earlier: Sequence[Rung] = ()
) -> list[Rung]:
    """Return the rungs of a race whose survivors are measured on `facts` facts.

    `few_steps`: the first of several rungs has fewer optimization steps than the others. `earlier`: the rungs of a
    race of the same candidates on fewer facts.
    """
    count = min(MAX_RUNGS, max(1, (candidates - 1).bit_length()))
    rungs: list[Rung] = []
    for number in range(count):
        share = FEW_STEPS_SHARE if few_steps and number == 0 and count > 1 else 1.0
        rung = Rung(-(-candidates // 2**number), -(-facts // 2 ** (count - 1 - number)), share)
        rungs.append(rung.with_new_facts([*earlier, *rungs]))
    return rungs


def race_cost(rungs: Sequence[Rung], candidates: Sequence[dict[str, Any]], trials: Trials) -> float:
    """Return the expected cost of a race, if the candidates of each rung are as costly as all of them on average."""
    total = 0.0
    for rung in rungs:
        new = rung.new_facts / rung.candidates
        costs = [trials.cost(rung.hparams_of(c), rung.facts, new) for c in candidates]
        total += rung.candidates * sum(costs) / len(costs)
    return total


@dataclass(frozen=True)
class Contender:
    """A candidate of a race, and its newest measurement."""

    number: int  #: in the order of the candidates
    hparams: dict[str, Any]  #: with all steps
    cost: float  #: of one fact
    measured: Measurement | None = None

    @property
    def rank(self) -> tuple[float, float, float, int]:
        """Return the key by which the best contender is the least one: the greatest objective, then the greatest
        margin, then the least work, then the first."""
        if self.measured is None:
            return (0.0, 0.0, self.cost, self.number)
        return (-self.measured.objective, -self.measured.margin, self.cost, self.number)


class Race:
    """A race between candidates. After each rung `leader` is the best of the rung."""

    def __init__(
        self,
        stage: str,
        candidates: Sequence[dict[str, Any]],
        rungs: Sequence[Rung],
        trials: Trials,
        schedule: RaceSchedule,
        on_rung: Callable[[Race], None] = lambda _: None,
    ) -> None:
        self.stage, self.rungs, self.trials, self.schedule = stage, rungs, trials, schedule
        self.on_rung = on_rung
        self.contenders = [Contender(i, c, trials.cost(c, 1, 1)) for i, c in enumerate(candidates)]
        self.leader: Contender | None = None
        self.rung = rungs[0]  #: that is measured
        self.rung_number = 0  #: of it, from 1; 0 before the start

    @property
    def label(self) -> str:
        """Where the race is, for people."""
        return f"{self.stage}, rung {self.rung_number} of {len(self.rungs)} ({count_facts(self.rung.facts)})"

    def execute(self) -> Stepper[Contender]:
        """Return the best contender of the last rung."""
        for number, rung in enumerate(self.rungs, 1):
            self.rung_number, self.rung = number, rung
            measured: list[Contender] = []
            for contender in self.contenders[: rung.candidates]:
                measured.append((yield from self._measure(contender, len(measured))))
            self.contenders = sorted(measured, key=lambda c: c.rank)
            self.leader = self.contenders[0]
            self.on_rung(self)
        assert self.leader is not None
        return self.leader

    def _measure(self, contender: Contender, number: int) -> Stepper[Contender]:
        rung, hparams = self.rung, self.rung.hparams_of(contender.hparams)
        left = self.schedule.seconds_left()
        progress = Progress(Phase.SEARCH, number, rung.candidates, self.label, seconds_left=left)
        yield progress
        measured = yield from report_as(self.trials.measure(self.stage, hparams, rung.facts), progress)
        planned = self.trials.cost(hparams, rung.facts, rung.new_facts / rung.candidates)
        self.schedule.add(planned, self.trials.cost(hparams, rung.facts, rung.facts), measured.seconds)
        return replace(contender, measured=measured)


def count_facts(number: int) -> str:
    """Return "1 fact", "2 facts"."""
    return f"{number} fact" if number == 1 else f"{number} facts"
