"""Long work as generators of steps: service.kit.steps."""

from __future__ import annotations

import pytest

from service.errors import Unavailable
from service.kit.steps import Progress, Steps, finish, persist, within


def count(to: int) -> Steps[str]:
    for i in range(to):
        yield Progress("count", i + 1, to)
    return "done"


def test_finish_runs_every_step_and_returns_the_result() -> None:
    """The result is the generator's, and each progress is reported once, in order."""
    seen: list[Progress] = []
    assert finish(count(3), seen.append) == "done"
    assert [p.done for p in seen] == [1, 2, 3]
    assert finish(count(0)) == "done"


def test_what_a_step_raises_is_raised() -> None:
    """An exception inside a step comes out of `finish`."""

    def broken() -> Steps[None]:
        yield Progress("count", 1, 2)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        finish(broken())


def test_a_part_is_told_as_the_whole() -> None:
    """Every step of a part is a step, with the progress of what it is a part of; the result is the part's."""
    seen: list[Progress] = []
    now = Progress("whole", 4, 9)
    assert finish(within(count(2), now), seen.append) == "done" and seen == [now, now]


def test_what_is_down_is_waited_for_a_step_at_a_time() -> None:
    """An action that meets an outage is done again after a step, and its result is the steps' result."""
    answers = iter([Unavailable("down."), Unavailable("down."), "done"])

    def action() -> str:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    seen: list[Progress] = []
    assert finish(persist(action), seen.append) == "done"
    assert len(seen) == 2
