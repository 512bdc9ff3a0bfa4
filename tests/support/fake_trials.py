"""A search without a model: a clock that only measurements advance, and an objective that is a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.kit.steps import Phase, Progress, Stepper
from service.tuning.racing import Measurement


class FakeClock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTrials:
    """Measures candidates by a function of their hyperparameters. A fact takes `seconds` for each unit of cost.

    `stored` are the facts measured of each candidate; trials that share it do not measure them again.
    """

    def __init__(
        self,
        clock: FakeClock,
        objective: Callable[[dict[str, Any]], float],
        seconds: float = 1.0,
        stored: dict[str, int] | None = None,
        margin: Callable[[dict[str, Any]], float] = lambda _: 0.0,
    ) -> None:
        self.clock, self.objective, self.seconds, self.margin = clock, objective, seconds, margin
        self.stored = {} if stored is None else stored
        self.measured: list[tuple[str, int]] = []  #: each candidate and fact, in order
        self.calls: list[tuple[str, dict[str, Any], int]] = []

    def cost(self, hparams: dict[str, Any], _facts: int, new_facts: float) -> float:
        return float(hparams.get("steps", 1)) * new_facts

    def measure(self, stage: str, hparams: dict[str, Any], facts: int) -> Stepper[Measurement]:
        self.calls.append((stage, hparams, facts))
        key, seconds = repr(sorted(hparams.items())), self.seconds * self.cost(hparams, 1, 1)
        for fact in range(self.stored.get(key, 0), facts):
            yield Progress(Phase.FIND, fact, facts)
            self.clock.now += seconds
            self.measured.append((key, fact))
            self.stored[key] = fact + 1
        return Measurement(self.objective(hparams), self.margin(hparams), seconds * facts)
