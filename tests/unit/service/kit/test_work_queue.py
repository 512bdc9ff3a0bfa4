"""Computations that several steppers wait for: service.kit.work_queue."""

from __future__ import annotations

import pytest

from service.errors import Misconfigured, PreparationFailed
from service.kit.steps import Phase, Progress, Stepper, advance, run_to_completion
from service.kit.work_queue import WorkQueue


def computing(log: list[int], count: int = 3) -> Stepper[int]:
    for i in range(count):
        log.append(i)
        yield Progress(Phase.CORPUS, i + 1, count)
    return count


def failing(error: Exception) -> Stepper[int]:
    yield Progress(Phase.CORPUS, 0, 1)
    raise error


def test_the_steps_of_a_task_run_once() -> None:
    """Two that wait in turn get the same result of one computation."""
    queue, log = WorkQueue(), list[int]()
    task = queue.submit(computing(log))
    one, two = queue.wait_for(task), queue.wait_for(task)
    advance(one)
    advance(two)
    assert (run_to_completion(one), run_to_completion(two)) == (3, 3)
    assert log == [0, 1, 2]


def test_tasks_run_in_order_of_submission() -> None:
    """Who waits for the second task runs the first one to its end before."""
    queue, log = WorkQueue(), list[int]()
    first, second = queue.submit(computing(log)), queue.submit(computing([]))
    assert run_to_completion(queue.wait_for(second)) == 3
    assert first.ended and log == [0, 1, 2]


def test_in_the_background_those_who_wait_run_nothing() -> None:
    """In the background a wait computes nothing and says so; it ends when the steps were run elsewhere."""
    queue, log = WorkQueue(), list[int]()
    queue.in_background = True
    task = queue.submit(computing(log))
    waiting = queue.wait_for(task)
    outcome = advance(waiting)
    assert isinstance(outcome, Progress) and outcome.waiting and outcome.phase == Phase.STATISTICS
    assert log == []
    while queue.pending:
        queue.step()
    assert run_to_completion(waiting) == 3


def test_an_error_is_that_of_all_who_wait_and_ends_nothing_else() -> None:
    """Both that wait for a failed task get its error; the next task runs."""
    queue = WorkQueue()
    task, other = queue.submit(failing(Misconfigured("no text"))), queue.submit(computing([]))
    for waiting in (queue.wait_for(task), queue.wait_for(task)):
        with pytest.raises(Misconfigured, match="no text"):
            run_to_completion(waiting)
    assert queue.error == "no text"
    assert run_to_completion(queue.wait_for(other)) == 3
    assert queue.error is None


def test_an_unexpected_error_becomes_one_that_says_what_failed() -> None:
    """An error of the system names its reason and no path."""
    queue = WorkQueue()
    task = queue.submit(failing(OSError(28, "No space left on device", "/secret/path")))
    with pytest.raises(PreparationFailed, match="No space left on device") as caught:
        run_to_completion(queue.wait_for(task))
    assert "secret" not in caught.value.detail


def test_a_closed_queue_releases_what_its_tasks_hold() -> None:
    """The cleanup of a task runs when its queue is closed, and nothing is left to do."""
    released: list[str] = []

    def holding() -> Stepper[None]:
        try:
            yield Progress(Phase.CORPUS, 0, 1)
        finally:
            released.append("lock")

    queue = WorkQueue()
    queue.submit(holding())
    queue.submit(computing([]))
    queue.step()
    queue.close()
    assert released == ["lock"]
    assert queue.progress is None and not queue.pending
