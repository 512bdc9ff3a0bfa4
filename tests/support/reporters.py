"""Reporters for job handlers that a test runs without an engine."""

from __future__ import annotations

from collections.abc import Callable

from service.kit.steps import Progress


class RaisingReporter:
    """Ignores progress and raises the error that a job ended with."""

    def progress(self, job_id: str, progress: Progress) -> None:
        pass

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        if error is not None:
            raise error


class CallbackReporter:
    """Ignores progress and calls a function with each job that ended and its error."""

    def __init__(self, on_finished: Callable[[str, Exception | None], None]) -> None:
        self._on_finished = on_finished

    def progress(self, job_id: str, progress: Progress) -> None:
        pass

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        self._on_finished(job_id, error)
