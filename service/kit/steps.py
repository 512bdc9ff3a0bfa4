"""Long work as a generator of steps, so that one engine loop can interleave it with decoding.

A long computation is written once, as a generator that yields a `Progress` after each short step and returns its result.
`finish` runs it to its end for those who do not interleave.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from service.errors import Unavailable

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of a phase, named by a word that a person understands."""

    phase: str
    done: int
    total: int


Stepper = Generator[Progress, None, T]


@dataclass(frozen=True)
class JobProgress:
    """How far one of several jobs is that are worked on together; a bare `Progress` is that of all."""

    job: str
    progress: Progress


@dataclass(frozen=True)
class JobFinished:
    """One of several jobs that are worked on together has come to its end; `error` says why it could not be done."""

    job: str
    error: Exception | None = None


JobUpdate = Progress | JobProgress | JobFinished
#: the steps of one or several jobs, which may end one by one; those that are left end with the last step
JobSteps = Generator[JobUpdate, None, None]


def run_to_completion(steps: Stepper[T], report: Callable[[Progress], None] | None = None) -> T:
    """Run all steps and return the result."""
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if report is not None:
            report(progress)


def report_as(steps: Stepper[T], progress: Progress) -> Stepper[T]:
    """The same steps, each told as that of the whole which they are a part of."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        yield progress


def retry_while_unavailable(action: Callable[[], T]) -> Stepper[T]:
    """Do it, and do it again after a step for as long as what it needs is down. For what may be done twice."""
    while True:
        try:
            return action()
        except Unavailable:
            yield Progress("wait for the store", 0, 1)
