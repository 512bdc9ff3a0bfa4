"""A worker: a resident model, the engine that serves it, and the thread that sends its heartbeats."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from service.bootstrap import Container, retention
from service.datasets.fact_table import FACTS_FILE, find_facts_file
from service.editing.context import EditorContext, open_editor_context
from service.engine.engine import Engine, EngineConfig
from service.engine.versioned_model import VersionedModel
from service.errors import DigestMismatch, Misconfigured, PalimpsestError, Unavailable
from service.jobs.job_kinds import CALL_KINDS
from service.jobs.job_store import JobStore
from service.jobs.worker_session import WorkerSession, delete_all_workers
from service.kit import metrics
from service.kit.ids import new_id
from service.kit.retry import retry_until_available
from service.ledger import audit
from service.ledger.cached import CachedLedger
from service.models.loading import LoadedModel
from service.settings import SHIPPED_MODEL, Settings
from workers.heartbeat import HeartbeatThread
from workers.job_handlers import job_handlers
from workers.model_info import model_info, tokenizer_json
from workers.preparation import Preparation
from workers.resident_model import load_served_model
from workers.roles import kinds_of_roles, parse_roles

log = logging.getLogger(__name__)

EDITING_ROLES = {"edit", "evaluate"}  #: of workers that need statistics of keys
RESTART_DELAY = 1.0  # seconds before the first restart of a loop that crashed; doubled for each further crash
MAX_RESTART_DELAY = 10.0  # seconds
STABLE_AFTER = 60.0  # seconds after which a restarted loop counts as stable


class Worker:
    """`run` serves in the calling thread, `start_in_thread` in one of its own, until `stop`.

    `ready` is set while requests are served, and `check` raises the error that ended the worker or crashed its loop.
    What edits need of the model is prepared while it serves; `preparation` says how far that is.
    """

    def __init__(self, settings: Settings, container: Container) -> None:
        self.id = new_id("worker")
        self.roles = parse_roles(settings.roles)
        self.model = ""  #: its name, once it is loaded
        self.ready = threading.Event()
        self.preparation: Preparation | None = None
        self.error: Exception | None = None  #: the error that ended the worker or last crashed its loop
        self._settings, self._container = settings, container
        self._crashes = 0  # consecutive
        self._max_restart_delay = min(
            MAX_RESTART_DELAY, max(RESTART_DELAY, settings.worker_timeout / 3)
        )  # restarted before its leases expire
        self._engine: Engine | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Load the model, register and serve. Raises the error that ends the worker."""
        try:
            self._run()
        except Exception as error:
            self.error = error
            log.exception("worker ended", extra={"worker": self.id})
            raise
        finally:
            self.ready.clear()

    def start_in_thread(self) -> threading.Thread:
        """Run in a thread, for the single-process wiring. Errors are logged, and `check` raises them."""

        def quietly() -> None:
            try:
                self.run()
            except Exception:
                return  # logged and kept

        self._thread = threading.Thread(target=quietly, name="worker", daemon=True)
        self._thread.start()
        return self._thread

    def stop(self) -> None:
        """Stop: let calls end, requeue jobs, and join the thread that `start_in_thread` started."""
        self._stop.set()
        with suppress(Unavailable):  # without a broker no loop sleeps in `receive`
            self._container.broker.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def check(self) -> None:
        """Raise the error of the worker if it is down now."""
        if self.error is not None:
            raise self.error

    def health_problem(self) -> str | None:
        """Return why this worker does not serve now; None while it serves."""
        if self.error is not None:
            return (
                self.error.detail
                if isinstance(self.error, PalimpsestError)
                else "the engine loop crashed: see the log."
            )
        if not self.ready.is_set():
            return "the worker is starting or stopping."
        if self._engine is not None and self._engine.hung:
            return "the engine loop hangs."
        return None

    def _run(self) -> None:
        settings, container = self._settings, self._container
        database = container.worker_database
        self._retry_until_available(database.migrate)
        self._retry_until_available(lambda: audit.establish(database))
        if container.single_process:
            delete_all_workers(database)  # before loading, which takes long: no worker is ready meanwhile
        model = self._load()
        self.model = model.name
        worker_session = WorkerSession(
            database,
            container.broker,
            model.fingerprint,
            self.id,
            lease=settings.worker_timeout,
            single_process=container.single_process,
            retention=retention(settings),
        )
        self._retry_until_available(lambda: self._refuse_foreign_workers(worker_session))
        context = open_editor_context(
            model,
            settings.data_dir / "statistics",
            settings.corpus,
            settings.covariance_tokens,
            facts=find_facts_file(model.path) or SHIPPED_MODEL / FACTS_FILE,
            form=settings.form,
        )
        self.preparation = Preparation(
            context, worker_session, prepares=bool(EDITING_ROLES & set(self.roles))
        )
        self._engine = self._make_engine(model, worker_session, context, self.preparation)
        self._serve(self._engine, worker_session, context)

    def _retry_until_available(self, action: Callable[[], None]) -> None:
        """Retry an action of the start: a process that exited would have to load the model again."""
        retry_until_available(
            action,
            self._stop,
            interval=RESTART_DELAY,
            on_retry=lambda error: log.warning(
                "waiting for a dependency", extra={"worker": self.id, "detail": error.detail}
            ),
        )

    def _make_engine(
        self,
        model: LoadedModel,
        worker_session: WorkerSession,
        context: EditorContext,
        preparation: Preparation,
    ) -> Engine:
        """Return the engine for the kinds of work of this worker's roles."""
        accepted_kinds = kinds_of_roles(self.roles)
        ledger = CachedLedger(worker_session.database, worker_session.model)
        job_store = JobStore(worker_session, self._settings.max_attempts)
        replica = VersionedModel(model, ledger, worker_session.attest)
        call_kinds = tuple(kind for kind in CALL_KINDS if kind in accepted_kinds)
        config = EngineConfig(max_edits_per_group=self._settings.max_edits_per_batch)
        context.classifiers.sources.append(job_store.newest_classifier)
        handlers = job_handlers(replica, job_store, context, accepted_kinds)
        return Engine(
            replica,
            worker_session,
            job_store,
            self._container.broker,
            handlers,
            config,
            call_kinds,
            [preparation],
        )

    def _refuse_foreign_workers(self, worker_session: WorkerSession) -> None:
        """Raise Misconfigured when workers serve another model: one service has one model."""
        if foreign_workers := worker_session.foreign_workers():
            raise Misconfigured(
                f"another model is being served: {'; '.join(foreign_workers)}. Stop its workers first (a killed one "
                f"counts for {self._settings.worker_timeout:.0f} seconds), or start this one with their --model."
            )

    def _load(self) -> LoadedModel:
        settings = self._settings
        log.info("loading", extra={"model": settings.model, "device": settings.device})
        return load_served_model(settings)

    def _serve(self, engine: Engine, worker_session: WorkerSession, context: EditorContext) -> None:
        """Run the loop until it is stopped, with heartbeats beside it."""
        assert self.preparation is not None
        heartbeat = HeartbeatThread(
            engine, worker_session, self._settings.worker_timeout, self.preparation.announce
        )
        self.preparation.on_end = heartbeat.beat_soon
        heartbeat.start()
        try:
            self._serve_with_restarts(engine, worker_session, heartbeat, context)
        finally:
            self.preparation.close()
            heartbeat.stop()
            self._deregister(worker_session)

    def _serve_with_restarts(
        self,
        engine: Engine,
        worker_session: WorkerSession,
        heartbeat: HeartbeatThread,
        context: EditorContext,
    ) -> None:
        """Run the loop, and restart it after a crash with an exponential delay."""
        while True:
            started = time.monotonic()
            try:
                self._register(worker_session, heartbeat, context)
                return engine.run(self._stop)
            except (DigestMismatch, Misconfigured):
                raise
            except Exception as error:
                self._mark_down(error, worker_session, heartbeat)
            self._crashes = 1 if time.monotonic() - started > STABLE_AFTER else self._crashes + 1
            if self._stop.wait(min(RESTART_DELAY * 2 ** (self._crashes - 1), self._max_restart_delay)):
                return self._requeue_work(engine)

    def _requeue_work(self, engine: Engine) -> None:
        """Try once to release the work of a loop that is stopped while it is down."""
        try:
            engine.run(self._stop)
        except Exception as error:  # other workers take it over when its leases expire
            log.warning("release failed", extra={"detail": str(error)})

    def _register(
        self, worker_session: WorkerSession, heartbeat: HeartbeatThread, context: EditorContext
    ) -> None:
        """Register the worker and send its first heartbeat."""
        self._refuse_foreign_workers(worker_session)
        assert self.preparation is not None
        info = self.preparation.known(model_info(context.model, context))
        worker_session.register(info, tokenizer_json(context.model), self.roles)
        heartbeat.resume()
        self.error = None
        self.ready.set()
        log.info("registered", extra={"worker": self.id, "model": context.model.name})

    def _mark_down(self, error: Exception, worker_session: WorkerSession, heartbeat: HeartbeatThread) -> None:
        """Stop the heartbeats after a crash of the loop.

        After an outage the loop resumes its work if it restarts within the lease. After another error the worker is
        deregistered, so that others take its work over at once.
        """
        metrics.ENGINE_RESTARTS.inc()
        heartbeat.paused = True
        if isinstance(error, Unavailable):
            log.warning("waiting", extra={"worker": self.id, "detail": error.detail})
        else:
            log.error("engine loop crashed", exc_info=error, extra={"worker": self.id})
            self._deregister(worker_session)
        self.error = error
        self.ready.clear()

    def _deregister(self, worker_session: WorkerSession) -> None:
        try:
            worker_session.deregister()
        except Exception as error:  # the lease expires
            log.warning("deregistration failed", extra={"detail": str(error)})
