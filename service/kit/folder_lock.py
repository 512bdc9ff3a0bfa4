"""A piece of work that processes which share a folder do once: one does it, the others wait for its files.

Nobody waits for a process that is suspended: the one that works says so every second, and its lock counts for nothing
when it has been silent for long.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from service.kit.steps import Phase, Progress, Stepper, StepperResult, advance

log = logging.getLogger(__name__)

T = TypeVar("T")
SIGN_INTERVAL = 1.0  # seconds between two signs of life
SILENCE_LIMIT = 60.0  # seconds without a sign after which a process counts as suspended


def once_in_folder(path: Path | None, stepper: Stepper[T]) -> Stepper[T]:
    """Run the steps while no other process runs them, and read its progress meanwhile. Work whose results lie in the
    folder by then finds them there.

    `path`: of the lock. None: no other process shares the work.
    """
    with closing(stepper):
        if path is None:
            return (yield from stepper)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, sign = FileLock(path, timeout=0), _Sign(path.with_suffix(".progress"))
        try:
            while not _acquired(lock) and not sign.is_silent():
                yield sign.progress()
            while True:
                outcome = advance(stepper)
                if isinstance(outcome, StepperResult):
                    return outcome.result
                if lock.is_locked:
                    sign.give(outcome)
                yield outcome
        finally:
            if lock.is_locked:
                sign.remove()
            lock.release()


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire()
    except Timeout:
        return False
    return True


class _Sign:
    """The progress of the process that works, in a file that it renews."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting_since = time.time()
        self._given_at = float("-inf")

    def give(self, progress: Progress) -> None:
        if time.monotonic() - self._given_at >= SIGN_INTERVAL:
            self._given_at = time.monotonic()
            self._path.write_text(json.dumps(progress.to_json()), encoding="utf-8")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def is_silent(self) -> bool:
        """Whether the process that holds the lock has given no sign for too long."""
        latest = self._waiting_since
        with suppress(OSError):
            latest = max(latest, self._path.stat().st_mtime)
        silent = time.time() - latest > SILENCE_LIMIT
        if silent:
            log.warning(
                "not waiting", extra={"detail": f"the process that holds {self._path.stem} is silent"}
            )
        return silent

    def progress(self) -> Progress:
        """Return the progress of the process that works."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            left = values.get("seconds_left")
            return Progress(
                Phase(values["phase"]),
                int(values["done"]),
                int(values["total"]),
                seconds_left=left,
                waiting=True,
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return Progress(Phase.WAIT, 0, 1, waiting=True)
