"""The loop of a worker: it interleaves decoding with single steps of long work.

A step of the loop admits new requests, decodes one token for every batch, steps every comparison, then runs at most
one bounded step of background work: building a version for an admitted call, following the ledger, the running job,
or the preparation of what edits need, in turn. Background work waits until calls have had their share of the time
since its last step. So no stream pauses longer than one such step plus one decode step, nor slows to less than that
share of its pace. No output mixes two versions: between two steps the model holds its base weights, and a check after
every step enforces it.

Events and writes go through an outbox in order. When the broker or the store is down they stay in it, `run` raises, and
the next `run` continues where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from service.engine.call_runner import CallRunner
from service.engine.job_runner import JobHandler, JobRunner
from service.engine.ledger_follower import LedgerFollower
from service.engine.outbox import Outbox
from service.engine.step_guard import check_step
from service.engine.versioned_model import VersionedModel
from service.errors import DigestMismatch, Unavailable
from service.jobs.broker import Broker, CallerFilter, Delivery
from service.jobs.job_kinds import CALL_KINDS, WORK_KINDS
from service.jobs.job_store import JobStore
from service.jobs.worker_session import WorkerSession
from service.kit import crash_points, metrics
from service.kit.steps import WAIT_INTERVAL
from service.kit.time_share import TimeShare

log = logging.getLogger(__name__)

STALL_TIMEOUT = 300.0  # seconds after which a loop without a step counts as hung
BUILD_SLICE = 0.01  # seconds that short steps of building a version may take together


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine, and how it shares its time."""

    max_batch_size: int = 32  #: sequences of one lane that decode together
    max_edits_per_group: int = 1  #: waiting edits that run as one group
    kv_memory_fraction: float = 0.5  #: of the memory that is free at the start, for keys and values
    generation_time_share: float = 0.6  #: of the time, for calls beside background work
    #: the same while all calls are of callers with many sequences
    heavy_generation_time_share: float = 0.4
    generation_head_start: float = 0.25  #: seconds that calls run alone after a time without calls
    job_slice: float = 0.03  #: seconds that short steps of a job may take together beside calls
    heavy_job_slice: float = 0.1  #: the same while all calls are of callers with many sequences
    max_comparisons: int = 4  #: concurrent comparisons
    idle_timeout: float = 1.0  #: longest sleep without work, in seconds
    cancel_poll_interval: float = 0.05  #: seconds between two polls for cancelled calls
    ledger_poll_interval: float = 0.5  #: seconds between two polls of the ledger's head
    drain_timeout: float = 5.0  #: seconds that running calls have to end when the engine stops


class BackgroundWork(Protocol):
    """Long work that advances in bounded steps."""

    @property
    def pending(self) -> bool: ...

    def step(self) -> None: ...


class Engine:
    """Serves one replica: calls of the given kinds, and jobs of the kinds that have handlers. `preparation` is
    background work without a job.

    Only `served_version`, `last_step_at` and `hung` may be used from other threads than the one that calls `run`.
    """

    def __init__(
        self,
        replica: VersionedModel,
        worker_session: WorkerSession,
        job_store: JobStore,
        broker: Broker,
        handlers: Mapping[str, JobHandler],
        config: EngineConfig | None = None,
        call_kinds: Collection[str] = CALL_KINDS,
        preparation: Sequence[BackgroundWork] = (),
    ) -> None:
        config = config or EngineConfig()
        self.replica = replica
        self.last_step_at = time.monotonic()  #: when the last step began
        self._broker = broker
        self._config = config
        self._call_kinds = tuple(kind for kind in WORK_KINDS if kind in call_kinds)
        self._outbox = Outbox(broker)
        self._calls = CallRunner(
            replica,
            broker,
            self._outbox,
            max_batch_size=config.max_batch_size,
            max_comparisons=config.max_comparisons,
            kv_memory_fraction=config.kv_memory_fraction,
            cancel_poll_interval=config.cancel_poll_interval,
            single_process=worker_session.single_process,
        )
        self._follower = LedgerFollower(replica, worker_session, config.ledger_poll_interval)
        self._jobs = JobRunner(
            replica,
            worker_session,
            job_store,
            broker,
            self._outbox,
            handlers,
            config.max_edits_per_group,
            self._follower.poll_soon,
        )
        self._background: deque[BackgroundWork] = deque(
            [self._calls, self._follower, self._jobs, *preparation]
        )
        self._building = (self._calls, self._follower)
        self._time_share = TimeShare(config.generation_time_share, config.generation_head_start)

    @property
    def served_version(self) -> tuple[int, str] | None:
        """The newest version that this replica serves, with its digest."""
        return self._follower.served_version

    @property
    def hung(self) -> bool:
        """Whether the last step began longer ago than the stall timeout."""
        return time.monotonic() - self.last_step_at > STALL_TIMEOUT

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set. Raises DigestMismatch when other replicas disagree. Drains and releases work
        first."""
        try:
            while not stop.is_set():
                if not self.step() and not stop.is_set():
                    self._idle()
        except DigestMismatch:
            with suppress(Unavailable, OSError):  # other workers take over what cannot be released
                self._shut_down()  # running generations are on versions that were agreed on
            raise
        self._shut_down()

    def step(self) -> bool:
        """Run one step of the loop. Return whether there was work."""
        self.last_step_at = started = time.monotonic()
        metrics.ENGINE_STEPS.inc()
        self._outbox.flush()
        self._follower.poll()
        self._admit()
        self._calls.poll_cancellations()
        has_calls = self._calls.active
        busy = has_calls or any(work.pending for work in self._background)
        self._calls.decode()
        self._calls.step_comparisons()
        ended = time.monotonic()
        if has_calls:
            self._time_share.add_foreground(ended - started)  # also the time of admission and of events
        if not has_calls or self._time_share.background_is_due:
            self._step_background(has_calls)
            self._time_share.add_background(time.monotonic() - ended, has_calls)
        return busy

    def _step_background(self, has_calls: bool) -> None:
        """Run one step of the next background work in turn; of each, where no call is active that it could delay."""
        config, is_light = self._config, self._calls.has_light_work or not has_calls
        self._time_share.foreground_share = (
            config.generation_time_share if is_light else config.heavy_generation_time_share
        )
        job_slice = (config.job_slice if is_light else config.heavy_job_slice) if has_calls else 0.0
        for _ in range(len(self._background)):
            work = self._background[0]
            self._background.rotate(-1)
            if work.pending:
                self._run_background(work, job_slice)
                if has_calls:
                    return

    def _run_background(self, work: BackgroundWork, job_slice: float) -> None:
        """Run one step, or steps of building a version for at most `BUILD_SLICE` seconds and one step.

        Steps of a job that are much shorter than a decode step run together, or the job would get less than its share.
        """
        if work is self._jobs:
            started = time.monotonic()
            work.step()
            longest = time.monotonic() - started
            while work.pending and time.monotonic() - started + longest < job_slice:
                before = time.monotonic()
                work.step()
                longest = max(longest, time.monotonic() - before)
        elif work not in self._building:
            with metrics.ENGINE_STEP_SECONDS.labels("prepare").time():
                work.step()
        else:
            started = time.monotonic()
            with metrics.ENGINE_STEP_SECONDS.labels("build").time():
                work.step()
                while work.pending and time.monotonic() - started < BUILD_SLICE:
                    work.step()
        check_step(self.replica, type(work).__name__)

    # admission

    def _acceptable_kinds(self) -> tuple[str, ...]:
        """Return the kinds of work that can be admitted now."""
        calls = (kind for kind in self._call_kinds if self._calls.can_admit(kind))
        return (*calls, *self._jobs.startable_kinds)

    def _receive(self, timeout: float) -> list[Delivery]:
        """Receive one delivery of those that can be admitted now."""
        kinds = self._acceptable_kinds()
        busy = {kind: self._calls.busy_callers(kind) for kind in kinds if kind in CALL_KINDS}
        busy |= {kind: self._jobs.busy_callers(kind) for kind in kinds if kind not in CALL_KINDS}
        return self._broker.receive(kinds, 1, timeout, CallerFilter(busy)) if kinds or timeout else []

    def _admit(self) -> None:
        """Receive the work that can be admitted. All waiting generations are admitted before a step prefills them
        together."""
        while deliveries := self._receive(0):
            self._start_all(deliveries)

    def _idle(self) -> None:
        """Wait for work. A wake-up without a delivery means that the head of the ledger has moved."""
        timeout = self._config.idle_timeout
        deliveries = self._receive(min(timeout, WAIT_INTERVAL) if self._jobs.waiting else timeout)
        if not deliveries:
            self._follower.poll_soon()
        self._start_all(deliveries)

    def _start_all(self, deliveries: Sequence[Delivery]) -> None:
        """Start deliveries in order. After an error that concerns all work, the rest is returned to the broker."""
        if deliveries:
            crash_points.crash_point("take.after")
        for number, delivery in enumerate(deliveries):
            start: Callable[[Delivery], None] = (
                self._calls.start if delivery.kind in CALL_KINDS else self._jobs.start
            )
            try:
                start(delivery)
            except Exception:
                for remaining in deliveries[number:]:
                    self._outbox.defer(self._broker.nack, remaining)
                with suppress(Unavailable, OSError):  # stays in the outbox
                    self._outbox.flush()
                raise
        self._outbox.flush()

    def _shut_down(self) -> None:
        """Requeue the jobs, let calls end until the drain timeout, and release the rest."""
        self._jobs.requeue_all()
        self._outbox.flush()
        deadline = time.monotonic() + self._config.drain_timeout
        while self._calls.active and time.monotonic() < deadline:
            self.last_step_at = time.monotonic()
            self._calls.poll_cancellations()
            self._calls.decode()
            self._calls.step_comparisons()
        self._calls.release_all()
        self._outbox.flush()
