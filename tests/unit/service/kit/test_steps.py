"""Long work as generators of steps: service.kit.steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from service.errors import Unavailable
from service.kit.steps import (
    Phase,
    Progress,
    Stepper,
    advance,
    report_as,
    retry_while_unavailable,
    run_steps,
    run_to_completion,
)


def count(to: int) -> Stepper[str]:
    for i in range(to):
        yield Progress(Phase.RUN, i + 1, to)
    return "done"


def test_run_to_completion_runs_every_step_and_returns_the_result() -> None:
    """The result is the generator's, and each progress is reported once, in order."""
    reported: list[Progress] = []
    assert run_steps(count(3), reported.append) == "done"
    assert [p.done for p in reported] == [1, 2, 3]
    assert run_to_completion(count(0)) == "done"


def test_what_a_step_raises_is_raised() -> None:
    """An exception inside a step comes out of `finish`."""

    def broken() -> Stepper[None]:
        yield Progress(Phase.RUN, 1, 2)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_to_completion(broken())


@pytest.mark.parametrize("end", ["returned", "raised", "closed"])
def test_ended_stepper_cannot_be_advanced(end: str) -> None:
    """A stepper that has ended raises RuntimeError; it does not return None as a second result."""

    def steps() -> Stepper[str]:
        yield Progress(Phase.RUN, 1, 1)
        if end == "raised":
            raise ValueError("broken")
        return "done"

    stepper = steps()
    with suppress(ValueError):
        run_to_completion(stepper) if end != "closed" else stepper.close()
    with pytest.raises(RuntimeError, match="has ended"):
        advance(stepper)


def test_report_as_reports_the_progress_of_the_whole() -> None:
    """Each step of the inner stepper is reported with the given progress; the result is that of the inner
    stepper."""
    reported: list[Progress] = []
    now = Progress(Phase.RUN, 4, 9)
    assert run_steps(report_as(count(2), now), reported.append) == "done" and reported == [now, now]


def test_retry_while_unavailable_retries_after_each_step() -> None:
    """An action that raises Unavailable is repeated after a step, and its result is the stepper's result."""
    answers: Iterator[Exception | str] = iter([Unavailable("down."), Unavailable("down."), "done"])

    def action() -> str:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    reported: list[Progress] = []
    assert run_steps(retry_while_unavailable(action), reported.append) == "done"
    assert len(reported) == 2
