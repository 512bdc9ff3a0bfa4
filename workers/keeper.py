"""The thread beside the loop: it says that the worker lives, and rings again for jobs whose bell was lost."""

from __future__ import annotations

import logging
import threading
import time

from service.jobs.desk import Desk
from service.serving.engine import Engine

log = logging.getLogger(__name__)

BEAT = 3.0  # seconds between two heartbeats; a tenth of the lease
SWEEP = 10.0  # seconds between two sweeps
HUNG = 300.0  # seconds after which a loop that did not come round counts as dead


class Keeper:
    """Runs from `start` to `stop`. While `paused` it is silent, so that readiness shows that nobody serves."""

    def __init__(self, engine: Engine, desk: Desk, beat: float = BEAT, sweep: float = SWEEP) -> None:
        self.paused = False
        self._engine, self._desk = engine, desk
        self._every, self._sweep_every = beat, sweep
        self._swept = float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.beat()
            except Exception as error:  # the next beat tries again; a lease has room for several
                log.warning("heartbeat failed", extra={"detail": str(error)})
            self._stop.wait(self._every)

    def beat(self) -> None:
        """One heartbeat, and a sweep when one is due."""
        if self.paused or time.monotonic() - self._engine.turned > HUNG:
            return
        if self._engine.position is not None:
            self._desk.heartbeat(*self._engine.position)
        if time.monotonic() - self._swept >= self._sweep_every:
            self._swept = time.monotonic()
            self._desk.sweep()
