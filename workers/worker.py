"""One worker: a resident model, the loop that serves it, and the thread that says that it lives."""

from __future__ import annotations

import logging
import threading
import time

import torch

from service.bootstrap import Wired
from service.errors import Misconfigured
from service.ids import new_id
from service.jobs.desk import Desk, forget_workers
from service.models.loading import LoadedModel, load
from service.progress import Progress
from service.serving.engine import Engine
from service.serving.replica import Replica
from service.settings import Settings
from service.toolkit import Toolkit, prepare_steps
from workers.card import card, tokenizer_json
from workers.keeper import Keeper
from workers.tasks import tasks

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REST, LONGEST = 1.0, 30.0  # seconds before a loop that fell is started again: the first time, and at most
STEADY = 60.0  # seconds after which a loop counts as sound again


class Worker:
    """`run` serves in the calling thread, `start_in_thread` in one of its own, until `stop`.

    `ready` is set once requests are served, `progress` tells how far the preparation is, `check` raises what ended or
    stopped the worker.
    """

    def __init__(self, settings: Settings, wired: Wired) -> None:
        self.id = new_id("worker")
        self.ready = threading.Event()
        self.progress: Progress | None = None
        self.error: Exception | None = None  #: what ended the worker, or what the loop last fell over
        self._settings, self._wired = settings, wired
        self._falls = 0  # of the loop, in a row
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Load, prepare, register and serve. Raises what makes that impossible."""
        try:
            self._run()
        except Exception as error:
            self.error = error
            log.exception("worker ended", extra={"worker": self.id})
            raise
        finally:
            self.ready.clear()

    def start_in_thread(self) -> threading.Thread:
        """The embedded wiring: errors are logged, and `check` raises them."""

        def quietly() -> None:
            try:
                self.run()
            except Exception:
                return  # logged and kept

        self._thread = threading.Thread(target=quietly, name="worker", daemon=True)
        self._thread.start()
        return self._thread

    def stop(self) -> None:
        """Stop kindly: no job is left half done, and what runs is handed back. Waits for a thread that was started."""
        self._stop.set()
        self._wired.broker.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def check(self) -> None:
        """Raise what the worker fell over, if it is down now."""
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        sole = self._settings.redis_url is None
        self._wired.database.migrate()
        if sole:
            forget_workers(self._wired.database)  # before the long loading: nobody is ready meanwhile
        model = self._load()
        toolkit = self._prepare(model)
        if toolkit is None:
            return
        desk = Desk(
            self._wired.database,
            self._wired.broker,
            model.fingerprint,
            self.id,
            self._settings.max_attempts,
            sole=sole,
        )
        replica = Replica(model, desk)
        engine = Engine(replica, desk, self._wired.broker, tasks(replica, desk, toolkit))
        self._serve(engine, desk, toolkit)

    def _load(self) -> LoadedModel:
        settings = self._settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.dtype not in DTYPES:
            raise Misconfigured(f"dtype {settings.dtype!r} is not known: use {' or '.join(DTYPES)}.")
        log.info("loading", extra={"model": settings.model, "device": settings.device})
        return load(settings.model, settings.device, DTYPES[settings.dtype])

    def _prepare(self, model: LoadedModel) -> Toolkit | None:
        """The editor's tools; made on the first start and read on later ones. None when stopped meanwhile."""
        settings, phase = self._settings, ""
        steps = prepare_steps(model, settings.data / "statistics", settings.corpus, settings.stat_tokens)
        while not self._stop.is_set():
            try:
                self.progress = next(steps)
            except StopIteration as end:
                self.progress = None
                return end.value  # type: ignore[no-any-return]
            if self.progress.phase != phase:
                phase = self.progress.phase
                log.info("preparing", extra={"phase": phase, "total": self.progress.total})
        steps.close()
        return None

    def _serve(self, engine: Engine, desk: Desk, toolkit: Toolkit) -> None:
        """Register, and run the loop until it is stopped; a loop that falls is shown as such and started again."""
        model = toolkit.model
        keeper = Keeper(engine, desk)
        desk.register(card(model, toolkit), tokenizer_json(model))
        log.info("registered", extra={"worker": self.id, "model": model.name})
        desk.sweep()
        keeper.start()
        self.ready.set()
        try:
            while True:
                started = time.monotonic()
                try:
                    return engine.run(self._stop)
                except Exception as error:
                    self._fallen(error, desk, keeper)
                    if self._stop.is_set():
                        return None
                self._falls = 1 if time.monotonic() - started > STEADY else self._falls + 1
                while not self._stop.wait(min(REST * 2 ** (self._falls - 1), LONGEST)):
                    if self._risen(desk, keeper, toolkit):
                        break
                    self._falls += 1
        finally:
            keeper.stop()
            self._leave(desk)

    def _fallen(self, error: Exception, desk: Desk, keeper: Keeper) -> None:
        """Say that nobody serves: no heartbeat, no row among the living."""
        log.error("loop fell", exc_info=error, extra={"worker": self.id})
        keeper.paused = True
        self._leave(desk)
        self.error = error
        self.ready.clear()

    def _risen(self, desk: Desk, keeper: Keeper, toolkit: Toolkit) -> bool:
        """Be among the living again, when the store answers."""
        try:
            desk.register(card(toolkit.model, toolkit), tokenizer_json(toolkit.model))
            keeper.paused = False
            keeper.beat()
        except Exception as error:
            log.warning("cannot register", extra={"detail": str(error)})
            keeper.paused = True
            return False
        self.error = None
        self.ready.set()
        log.info("registered", extra={"worker": self.id, "model": toolkit.model.name})
        return True

    def _leave(self, desk: Desk) -> None:
        try:
            desk.leave()
        except Exception as error:  # the lease ends it
            log.warning("cannot leave", extra={"detail": str(error)})
