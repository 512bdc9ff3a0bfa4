"""Work that processes which share a folder do once: service.kit.folder_lock."""

from __future__ import annotations

import os
from pathlib import Path

from service.kit import folder_lock
from service.kit.folder_lock import once_in_folder
from service.kit.steps import Phase, Progress, Stepper, StepperResult, advance, run_to_completion


def working(log: list[str], name: str, count: int = 3) -> Stepper[str]:
    for i in range(count):
        log.append(name)
        yield Progress(Phase.CORPUS, i, count)
    return name


def test_one_works_and_the_other_waits(tmp_path: Path) -> None:
    """The second waits with the progress of the first until that has ended, and then runs."""
    log: list[str] = []
    lock = tmp_path / "work.lock"
    first, second = (once_in_folder(lock, working(log, name)) for name in ("first", "second"))
    advance(first)
    waiting = advance(second)
    assert isinstance(waiting, Progress) and waiting.waiting
    assert (waiting.phase, waiting.done, waiting.total) == (Phase.CORPUS, 0, 3)
    assert run_to_completion(first) == "first"
    assert log == ["first"] * 3
    assert run_to_completion(second) == "second"


def test_a_closed_stepper_frees_the_work(tmp_path: Path) -> None:
    """Work that is given up waits for nobody."""
    lock = tmp_path / "work.lock"
    first, second = (once_in_folder(lock, working([], name)) for name in ("first", "second"))
    advance(first)
    first.close()
    assert run_to_completion(second) == "second"


def test_nobody_waits_for_a_process_that_is_silent(tmp_path: Path) -> None:
    """When the one that works has given no sign for long, the other one works beside it."""
    log: list[str] = []
    lock = tmp_path / "work.lock"
    first, second = (once_in_folder(lock, working(log, name)) for name in ("first", "second"))
    advance(first)
    assert isinstance(advance(second), Progress)
    long_ago = os.stat(tmp_path / "work.progress").st_mtime - 2 * folder_lock.SILENCE_LIMIT
    os.utime(tmp_path / "work.progress", (long_ago, long_ago))
    third = once_in_folder(lock, working(log, "third"))
    outcome = advance(third)
    assert isinstance(outcome, Progress) and outcome.waiting, "it has only begun to wait"
    folder_lock_limit, folder_lock.SILENCE_LIMIT = folder_lock.SILENCE_LIMIT, -1.0
    try:
        while not isinstance(outcome, StepperResult):
            outcome = advance(third)
    finally:
        folder_lock.SILENCE_LIMIT = folder_lock_limit
    assert outcome.result == "third"
    assert log.count("third") == 3 and log.count("first") == 1
