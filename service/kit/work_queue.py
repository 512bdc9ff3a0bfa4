"""Computations that several steppers wait for. The steps of each run once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from service.errors import PalimpsestError, PreparationFailed
from service.kit.steps import WAIT_INTERVAL, Phase, Progress, Stepper, StepperResult, advance

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False)
class Task(Generic[T]):
    """A computation of a queue: its steps, then its result or its error."""

    steps: Stepper[T]
    progress: Progress = field(default_factory=lambda: Progress(Phase.PREPARE, 0, 1))
    ended: bool = False
    error: Exception | None = None
    _result: list[T] = field(default_factory=list)

    def finish(self, result: T) -> None:
        self._result.append(result)
        self.ended = True

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended = True

    @property
    def result(self) -> T:
        """The result of a task that has ended. Raises its error."""
        if self.error is not None:
            raise self.error
        return self._result[0]


class WorkQueue:
    """Tasks that run one after another.

    In a worker the engine runs a step of them between other steps: then `in_background` is set, and those who wait
    only look. Elsewhere those who wait run the steps.
    """

    def __init__(self) -> None:
        self.in_background = False
        self.error: str | None = None  #: why the latest task failed, until one succeeds
        self._tasks: deque[Task[Any]] = deque()
        self._next_look_at = 0.0

    @property
    def progress(self) -> Progress | None:
        """The progress of the running task; None without tasks. May be read by other threads."""
        try:
            return self._tasks[0].progress
        except IndexError:
            return None

    @property
    def pending(self) -> bool:
        """Whether there is a step to run now."""
        return bool(self._tasks) and time.monotonic() >= self._next_look_at

    def submit(self, steps: Stepper[T]) -> Task[T]:
        """Add a task."""
        task = Task(steps)
        self._tasks.append(task)
        return task

    def step(self) -> None:
        """Run one step of the first task. Its error is that of those who wait for it, and of nothing else."""
        if not self._tasks:
            return
        task = self._tasks[0]
        try:
            outcome = advance(task.steps)
        except Exception as error:
            self._tasks.popleft()
            task.fail(_domain_error(error))
            self.error = task.error.detail if isinstance(task.error, PalimpsestError) else str(task.error)
            if self.in_background:
                log.exception("preparation failed", extra={"detail": self.error})
            return
        if isinstance(outcome, StepperResult):
            self._tasks.popleft()
            self.error = None
            task.finish(outcome.result)
        else:
            task.progress = outcome
            self._next_look_at = time.monotonic() + WAIT_INTERVAL if outcome.waiting else 0.0

    def close(self) -> None:
        """End all tasks where they are, so that they release what they hold, such as the lock of a folder."""
        while self._tasks:
            self._tasks.popleft().steps.close()

    def wait_for(self, task: Task[T]) -> Stepper[T]:
        """Return the result of a task once it has ended, or raise its error."""
        yield from self.wait_until(task, lambda: False)
        return task.result

    def wait_until(self, task: Task[Any], reached: Callable[[], bool]) -> Stepper[None]:
        """Return when a task has ended or reached what the caller waits for. Raise its error."""
        while not (reached() or task.ended):
            if self.in_background:
                progress = self.progress or task.progress
                yield replace(progress, phase=Phase.STATISTICS, detail=str(progress.phase), waiting=True)
            else:
                self.step()
                yield self.progress or task.progress
        if not reached():
            _ = task.result


def _domain_error(error: Exception) -> Exception:
    """Return an error that says to users what failed. Its text names no path: that is in the log."""
    if isinstance(error, PalimpsestError):
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return PreparationFailed(
        f"what edits need of the model could not be prepared ({reason}): the log of the worker has the details. "
        "The next edit tries again."
    )
