"""One worker: a resident model, the loop that serves it, and the thread that says that it lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from service.bootstrap import Wired
from service.editing.context import Toolkit, prepare_steps
from service.engine.engine import Engine, Pace
from service.engine.versioned_model import Replica
from service.errors import Disagrees, Misconfigured, PalimpsestError, Unavailable
from service.jobs.broker import CALLS
from service.jobs.job_store import Desk, forget_workers
from service.kit import metrics
from service.kit.ids import new_id
from service.kit.steps import Progress
from service.models.loading import LoadedModel
from service.settings import Settings
from workers.heartbeat import Keeper
from workers.job_handlers import tasks
from workers.model_info import card, tokenizer_json
from workers.resident_model import resident
from workers.roles import kinds, roles

log = logging.getLogger(__name__)

REST, LONGEST = 1.0, 10.0  # seconds before a loop that fell is started again: the first time, and at most
STEADY = 60.0  # seconds after which a loop counts as sound again


class Worker:
    """`run` serves in the calling thread, `start_in_thread` in one of its own, until `stop`.

    `ready` is set once requests are served, `progress` tells how far the preparation is, `check` raises what ended or
    stopped the worker.
    """

    def __init__(self, settings: Settings, wired: Wired) -> None:
        self.id = new_id("worker")
        self.roles = roles(settings.roles)
        self.model = ""  #: its name, once it is loaded
        self.ready = threading.Event()
        self.progress: Progress | None = None
        self.error: Exception | None = None  #: what ended the worker, or what the loop last fell over
        self._settings, self._wired = settings, wired
        self._falls = 0  # of the loop, in a row
        self._longest = min(LONGEST, max(REST, settings.lease / 3))  # back before its work is taken over
        self._engine: Engine | None = None
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
        with suppress(Unavailable):  # a queue that is down holds no loop asleep
            self._wired.broker.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def check(self) -> None:
        """Raise what the worker fell over, if it is down now."""
        if self.error is not None:
            raise self.error

    def trouble(self) -> str | None:
        """Why this worker serves nothing now; None while it does."""
        if self.error is not None:
            return (
                self.error.detail
                if isinstance(self.error, PalimpsestError)
                else "its loop fell: see the log."
            )
        if not self.ready.is_set():
            return "it is starting or stopping."
        if self._engine is not None and self._engine.hung:
            return "its loop hangs."
        return None

    def _run(self) -> None:
        settings, wired = self._settings, self._wired
        self._patiently(wired.database.migrate)
        if wired.sole:
            forget_workers(wired.database)  # before the long loading: nobody is ready meanwhile
        model = self._load()
        self.model = model.name
        desk = Desk(
            wired.database,
            wired.broker,
            model.fingerprint,
            self.id,
            settings.max_attempts,
            lease=settings.lease,
            sole=wired.sole,
        )
        self._patiently(lambda: self._refuse_strangers(desk))
        toolkit = self._prepare(model)
        if toolkit is not None:
            self._engine = self._make_engine(model, desk, toolkit)
            self._serve(self._engine, desk, toolkit)

    def _patiently(self, need: Callable[[], None]) -> None:
        """What is down before the loop runs is waited for: a process that ended would have to load all over again."""
        while not self._stop.is_set():
            try:
                need()
            except Unavailable as error:
                log.warning("waiting", extra={"worker": self.id, "detail": error.detail})
                self._stop.wait(REST)
            else:
                return

    def _make_engine(self, model: LoadedModel, desk: Desk, toolkit: Toolkit) -> Engine:
        """The loop, for the kinds of work of this worker's roles."""
        taken = kinds(self.roles)
        replica = Replica(model, desk)
        calls = tuple(kind for kind in CALLS if kind in taken)
        pace = Pace(edits=self._settings.edits_together)
        work = tasks(replica, desk, toolkit, taken)
        return Engine(replica, desk, self._wired.broker, work, pace, calls)

    def _refuse_strangers(self, desk: Desk) -> None:
        """One service has one model: edits of another would wait for ever."""
        if strangers := desk.strangers():
            raise Misconfigured(
                f"another model is being served: {'; '.join(strangers)}. Stop its workers first (one that was killed counts "
                f"for {self._settings.lease:.0f} seconds), or start this one with their --model."
            )

    def _load(self) -> LoadedModel:
        settings = self._settings
        log.info("loading", extra={"model": settings.model, "device": settings.device})
        return resident(settings)

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
        keeper = Keeper(engine, desk, self._settings.lease)
        keeper.start()
        try:
            self._go_on(engine, desk, keeper, toolkit)
        finally:
            keeper.stop()
            self._leave(desk)

    def _go_on(self, engine: Engine, desk: Desk, keeper: Keeper, toolkit: Toolkit) -> None:
        """The loop, again and again, with ever longer pauses while it falls."""
        while True:
            started = time.monotonic()
            try:
                self._rise(desk, keeper, toolkit)
                return engine.run(self._stop)
            except (Disagrees, Misconfigured):
                raise
            except Exception as error:
                self._fall(error, desk, keeper)
            self._falls = 1 if time.monotonic() - started > STEADY else self._falls + 1
            if self._stop.wait(min(REST * 2 ** (self._falls - 1), self._longest)):
                return self._hand_back(engine)

    def _hand_back(self, engine: Engine) -> None:
        """Stopped while the loop is down: a last try to hand back what it holds."""
        try:
            engine.run(self._stop)
        except Exception as error:  # it is taken over when its leases are over
            log.warning("cannot hand back", extra={"detail": str(error)})

    def _rise(self, desk: Desk, keeper: Keeper, toolkit: Toolkit) -> None:
        """Be among the living."""
        self._refuse_strangers(desk)
        desk.register(card(toolkit.model, toolkit), tokenizer_json(toolkit.model), self.roles)
        keeper.resume()
        self.error = None
        self.ready.set()
        log.info("registered", extra={"worker": self.id, "model": toolkit.model.name})

    def _fall(self, error: Exception, desk: Desk, keeper: Keeper) -> None:
        """Nobody serves: no heartbeat. When something that all need is down, what was begun here is gone on with, if
        that is within the lease; a loop at fault gives it up at once."""
        metrics.RESTARTS.inc()
        keeper.paused = True
        if isinstance(error, Unavailable):
            log.warning("waiting", extra={"worker": self.id, "detail": error.detail})
        else:
            log.error("loop fell", exc_info=error, extra={"worker": self.id})
            self._leave(desk)
        self.error = error
        self.ready.clear()

    def _leave(self, desk: Desk) -> None:
        try:
            desk.leave()
        except Exception as error:  # the lease ends it
            log.warning("cannot leave", extra={"detail": str(error)})
