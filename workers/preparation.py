"""What edits need of a resident model, prepared while the worker serves, and how far that is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from service.editing.context import EditorContext
from service.jobs.worker_session import COLLECTED, WorkerSession
from service.kit.steps import Progress

log = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # seconds between two lines of the log


class Preparation:
    """Background work of the engine. `announce` is called by the thread that sends the heartbeats, which `on_end` calls
    for when the preparation has ended: clients wait for the statistics.

    `prepares`: whether the worker edits or evaluates. One that does not collects nothing.
    """

    def __init__(self, context: EditorContext, worker_session: WorkerSession, *, prepares: bool) -> None:
        self._context, self._worker_session, self._prepares = context, worker_session, prepares
        self._announced: dict[str, Any] = {}
        self._logged_at = float("-inf")
        self._was_running = False
        self.on_end: Callable[[], None] = lambda: None
        context.queue.in_background = True
        if prepares:
            context.prepare_in_background()

    # the engine's side

    @property
    def pending(self) -> bool:
        """Whether there is a step to run now."""
        return self._context.queue.pending

    def step(self) -> None:
        """Run one step, and log the progress now and then."""
        self._context.queue.step()
        progress = self.progress
        if progress is None:
            if self._was_running and self.error is None:
                log.info("prepared", extra={"statistics": sorted(self._context.statistics)})
            self._was_running, self._logged_at = False, float("-inf")
            self.on_end()
            return
        self._was_running = True
        if time.monotonic() - self._logged_at >= LOG_INTERVAL:
            self._logged_at = time.monotonic()
            log.info("preparing", extra=progress.to_json())

    def close(self) -> None:
        """End the preparation where it is. Another worker, or the next start, continues from its checkpoints."""
        self._context.queue.close()

    # the other side

    @property
    def progress(self) -> Progress | None:
        """The progress of the preparation; None when there is nothing to prepare."""
        return self._context.queue.progress

    @property
    def error(self) -> str | None:
        """Why the latest preparation failed."""
        return self._context.queue.error

    def describe(self) -> dict[str, Any] | None:
        """Return the progress as GET /models shows it; None when there is nothing to prepare."""
        progress = self.progress
        if progress is not None:
            return {
                "phase": None,
                "done": 0,
                "total": 0,
                "seconds_left": None,
                "error": None,
            } | progress.to_json()
        if self.error is not None:
            return {"phase": "failed", "done": 0, "total": 0, "seconds_left": None, "error": self.error}
        return None

    def known(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return the parts of a model's description that this worker knows."""
        return {key: value for key, value in info.items() if self._prepares or key not in COLLECTED}

    def announce(self) -> None:
        """Write the progress with the next heartbeat, and what was computed since the last call."""
        self._worker_session.preparing = self.describe()
        info = self.known(self._context.info())
        if self._announced and info != self._announced:
            self._worker_session.update_info(info)
        self._announced = info
