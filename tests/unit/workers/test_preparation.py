"""What a worker prepares while it serves: workers.preparation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.editing.context import EditorContext
from service.errors import Unavailable
from service.jobs.worker_session import WorkerSession
from service.kit.steps import Phase, Progress, Stepper
from service.kit.work_queue import WorkQueue
from workers.preparation import Preparation


def steps(count: int, error: Exception | None = None) -> Stepper[None]:
    for number in range(count):
        yield Progress(Phase.STATISTICS, number, count)
    if error is not None:
        raise error


@pytest.fixture
def preparation() -> Preparation:
    """The preparation of a context for which nothing is to be computed yet."""
    context = SimpleNamespace(queue=WorkQueue(), statistics={})
    return Preparation(
        cast(EditorContext, context), cast(WorkerSession, SimpleNamespace(preparing=None)), prepares=False
    )


@pytest.mark.parametrize(
    "tasks", [[steps(0)], [steps(2), steps(1)], [steps(1, Unavailable("The disk is full."))]]
)
def test_the_end_is_announced_at_once(preparation: Preparation, tasks: list[Any]) -> None:
    """`on_end` is called when the last task has ended or failed, and not before."""
    ended: list[bool] = []
    preparation.on_end = lambda: ended.append(preparation.pending)
    for task in tasks:
        preparation._context.queue.submit(task)
    while preparation.pending:
        assert ended == []
        preparation.step()
    assert ended == [False]
