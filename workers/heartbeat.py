"""The thread beside the engine loop: it sends the heartbeats of a worker and notifies workers of lost jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from service.engine.engine import Engine
from service.jobs.worker_session import WorkerSession

log = logging.getLogger(__name__)


class HeartbeatThread:
    """Runs from `start` to `stop`. While `paused` it sends no heartbeat, so that readiness shows that the worker is
    down.

    It beats several times within a lease, and finds a job whose notification was lost within one.
    """

    def __init__(
        self,
        engine: Engine,
        worker_session: WorkerSession,
        lease: float,
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        """`announce` is called before each heartbeat."""
        self.paused = True  # until the worker is registered
        self._announce = announce
        self._engine, self._worker_session = engine, worker_session
        self._interval = min(max(lease / 10, 0.2), 5.0)
        self._sweep_interval = min(max(lease / 3, 0.5), 20.0)
        self._last_sweep_at = float("-inf")
        self._stop, self._due = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._due.set()
        self._thread.join()

    def resume(self) -> None:
        """Send heartbeats again. The next sweep waits: an outage may have stopped the heartbeats of other workers
        too."""
        if self._last_sweep_at > float("-inf"):
            self._last_sweep_at = time.monotonic()
        self.paused = False
        self.beat()

    def beat_soon(self) -> None:
        """Send the next heartbeat at once, for what clients wait for. Returns before it is sent."""
        self._due.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._due.clear()
            try:
                self.beat()
            except Exception as error:  # the next beat tries again, within the lease
                log.warning("heartbeat failed", extra={"detail": str(error)})
            self._due.wait(self._interval)

    def beat(self) -> None:
        """Send one heartbeat, and sweep for lost jobs when a sweep is due."""
        if self.paused or self._engine.hung:
            return
        self._announce()
        if self._engine.served_version is not None:
            self._worker_session.heartbeat(*self._engine.served_version)
        if time.monotonic() - self._last_sweep_at >= self._sweep_interval:
            self._worker_session.notify_lost_jobs()
            self._last_sweep_at = time.monotonic()
