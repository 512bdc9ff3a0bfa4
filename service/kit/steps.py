"""Long computations as generators of bounded steps, which the engine loop interleaves with decoding.

A long computation is a generator that yields a `Progress` after each short step and returns its result. Whoever holds a
stepper decides when the next step runs: the engine runs one between two decode steps, `run_steps` runs all of them.
Between two steps the model holds its base weights and no hook is installed.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from service.errors import Unavailable

T = TypeVar("T")
WAIT_INTERVAL = 0.1  # seconds between two looks at what other work, or another process, has to finish first


class Phase(StrEnum):
    """What a step computes. The value is the word on the wire, in logs and in metric labels."""

    # preparation of a model
    CORPUS = "corpus"
    CONTEXTS = "contexts"
    STATISTICS = "statistics"
    COLLECT = "collect"
    FACTORIZE = "factorize"
    # edits
    ANSWER = "answer"
    OPTIMIZE = "optimize"
    TRAIN = "train"
    SOLVE = "solve"
    COMPOSE = "compose"
    DIGEST = "digest"
    CAPACITY = "capacity"
    BASELINE = "baseline"
    MEASURE = "measure"
    PERPLEXITY = "perplexity"
    GUARD = "guard"
    COMMIT = "commit"
    RETRY = "retry"
    # evaluations, tuning and studies
    FIND = "find"
    STRENGTHEN = "strengthen"
    PROBE = "probe"
    DRIFT = "drift"
    GENERATE = "generate"
    SAMPLE = "sample"
    SEARCH = "search"
    EDIT = "edit"
    AVERAGE = "average"
    SUMMARIZE = "summarize"
    # traces, comparisons and exports
    PREPARE = "prepare"
    RUN = "run"
    TRACE = "trace"
    COMPARE = "compare"
    VERIFY = "verify"
    STORE = "store"
    WAIT = "wait"


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a phase. `detail` tells apart passes of one phase in local progress bars.

    `waiting`: the step computed nothing, because other work has to finish first. Its next step can wait
    `WAIT_INTERVAL`, and less urgent work may run meanwhile.
    """

    phase: Phase
    done: int
    total: int
    detail: str = ""
    seconds_left: float | None = None  #: an estimate for the whole work, where there is one
    waiting: bool = False

    @property
    def label(self) -> str:
        """The phase as people read it, with the detail."""
        return f"{self.phase}: {self.detail}" if self.detail else str(self.phase)

    def to_json(self) -> dict[str, str | int]:
        """The progress as jobs, events and the HTTP API carry it."""
        progress: dict[str, str | int] = {"phase": str(self.phase), "done": self.done, "total": self.total}
        if self.seconds_left is not None:
            progress["seconds_left"] = round(self.seconds_left)
        return progress


Stepper = Generator[Progress, None, T]


@dataclass(frozen=True)
class StepperResult(Generic[T]):
    """The result of a stepper that has no more steps."""

    result: T


class JobReporter(Protocol):
    """Where a job handler reports on its jobs. It may be called at any point of a step.

    The engine reports nothing by itself: the progress that a stepper yields only marks the end of a step.
    """

    def progress(self, job_id: str, progress: Progress) -> None:
        """Report how far one job is."""

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        """Report that one job has ended. `error` is the reason when it failed."""


def advance(stepper: Stepper[T]) -> Progress | StepperResult[T]:
    """Run one step. Return its progress, or the completion when the stepper has returned.

    Raises RuntimeError for a stepper that has returned, raised or been closed: it has no result to return again.
    """
    if inspect.getgeneratorstate(stepper) == inspect.GEN_CLOSED:
        raise RuntimeError("the stepper has ended: make a new one")
    try:
        return next(stepper)
    except StopIteration as end:
        return StepperResult(end.value)


def run_steps(stepper: Stepper[T], on_progress: Callable[[Progress], None] | None = None) -> T:
    """Run all steps and return the result. `on_progress` is called after each step."""
    while isinstance(outcome := advance(stepper), Progress):
        if on_progress is not None:
            on_progress(outcome)
        if outcome.waiting:
            time.sleep(WAIT_INTERVAL)
    return outcome.result


def run_to_completion(stepper: Stepper[T]) -> T:
    """Run all steps and return the result."""
    return run_steps(stepper)


def step_within(
    stepper: Stepper[T], make_context: Callable[[], AbstractContextManager[object]]
) -> Stepper[T]:
    """Run each step inside a context of its own, which is closed before the step is yielded."""
    with closing(stepper):
        while True:
            with make_context():
                outcome = advance(stepper)
            if isinstance(outcome, StepperResult):
                return outcome.result
            yield outcome


def report_as(stepper: Stepper[T], progress: Progress) -> Stepper[T]:
    """Run the same steps, each yielded as the given progress of the whole that they are a part of."""
    with closing(stepper):
        while isinstance(outcome := advance(stepper), Progress):
            yield outcome if outcome.waiting else progress
        return outcome.result


def report_to(reporter: JobReporter, job_ids: Iterable[str], stepper: Stepper[T]) -> Stepper[T]:
    """Run the same steps and report the progress of each as that of the given jobs."""
    job_ids = list(job_ids)
    with closing(stepper):
        while isinstance(outcome := advance(stepper), Progress):
            for job_id in job_ids:
                reporter.progress(job_id, outcome)
            yield outcome
        return outcome.result


def retry_while_unavailable(action: Callable[[], T]) -> Stepper[T]:
    """Call an idempotent action, again after each step as long as it raises `Unavailable`, and return its result."""
    while True:
        try:
            return action()
        except Unavailable:
            yield Progress(Phase.WAIT, 0, 1)
