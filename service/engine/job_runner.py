"""Runs jobs one step at a time: claims them, applies their reports, and hands them back when the engine stops.

A job of a more urgent kind suspends the others of its caller. The jobs of several callers share the time, whatever
their kinds are, so that no caller waits for the jobs of another. A job that waits for other work holds up none.
Another worker may take over a job whose lease has expired; the attempt number in the job's row is the fence, so a job
runs on until the store rejects a write.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.calls import log_fields
from service.engine.outbox import Outbox
from service.engine.step_guard import check_step
from service.engine.versioned_model import VersionedModel
from service.errors import Cancelled, DigestMismatch, LeaseLost, PalimpsestError, Unavailable
from service.jobs.broker import Broker, CallerFilter, Delivery
from service.jobs.job_kinds import JOB_KINDS, WORK_KINDS
from service.jobs.job_store import ClaimedJob, JobStore
from service.kit import metrics
from service.kit.steps import WAIT_INTERVAL, JobReporter, Phase, Progress, Stepper, StepperResult, advance
from service.kit.virtual_times import VirtualTimes

log = logging.getLogger(__name__)

MAX_INTERRUPTIONS = 10  # times that an outage interrupts a job before the job fails
MAX_GROUPS_PER_KIND = 4  # callers whose jobs of one kind run at the same time
HEAD_START = 1.0  # seconds of a caller before the jobs of others

JobsById = dict[str, tuple[Delivery, ClaimedJob]]


class JobHandler(Protocol):
    """Makes the stepper of a group of jobs. It writes the end of each job and reports to `reporter`."""

    def __call__(self, reporter: JobReporter, /, *jobs: ClaimedJob) -> Stepper[None]: ...


@dataclass
class ReportQueue:
    """The reports that a handler makes during a step. The runner applies them after the step."""

    reports: deque[tuple[str, Progress | Exception | None]] = field(default_factory=deque)

    def progress(self, job_id: str, progress: Progress) -> None:
        self.reports.append((job_id, progress))

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        self.reports.append((job_id, error))


@dataclass(eq=False)
class JobGroup:
    """Jobs of one caller that run in one stepper, and those of them that have not ended."""

    kind: str
    caller: str
    members: JobsById
    reporter: ReportQueue
    steps: Stepper[None]
    phase: str = ""  #: of the last step
    resumes_at: float | None = None  #: when a group that waits for other work looks again

    @property
    def waits(self) -> bool:
        """Whether the group waits for other work, such as the statistics that the engine collects."""
        return self.resumes_at is not None

    @property
    def is_due(self) -> bool:
        """Whether the group has a step to run now."""
        return self.resumes_at is None or time.monotonic() >= self.resumes_at

    @property
    def jobs(self) -> list[ClaimedJob]:
        return [job for _, job in self.members.values()]


class EditWorkers(Protocol):
    """What the runner reads of the other workers."""

    def count_edit_workers(self) -> int: ...


class JobRunner:
    """The running groups of jobs and those that they suspended.

    `on_job_end` is called when a job ends: the head may have moved.
    """

    def __init__(
        self,
        replica: VersionedModel,
        workers: EditWorkers,
        job_store: JobStore,
        broker: Broker,
        outbox: Outbox,
        handlers: Mapping[str, JobHandler],
        max_edits_per_group: int,
        on_job_end: Callable[[], None],
    ) -> None:
        self._replica = replica
        self._workers = workers
        self._job_store = job_store
        self._broker = broker
        self._outbox = outbox
        self._handlers = handlers
        self._kinds = tuple(kind for kind in WORK_KINDS if kind in handlers)
        self._max_edits_per_group = max_edits_per_group
        self._on_job_end = on_job_end
        self._groups: list[JobGroup] = []  # that of the most urgent kind of each caller runs
        self._times = VirtualTimes(HEAD_START)
        self._interruptions: Counter[str] = Counter()
        self._starts_nothing = False  # until a group ends

    @property
    def pending(self) -> bool:
        """Whether there is a step to run."""
        return any(group.is_due for group in self._groups)

    @property
    def waiting(self) -> bool:
        """Whether a group waits for other work."""
        return any(group.waits for group in self._groups)

    @property
    def startable_kinds(self) -> tuple[str, ...]:
        """The kinds of job that may start now."""
        if self._starts_nothing and self._groups:
            return ()
        counts = Counter(group.kind for group in self._groups)
        return tuple(kind for kind in self._kinds if counts[kind] < MAX_GROUPS_PER_KIND)

    def busy_callers(self, kind: str) -> set[str]:
        """Return the callers that have a job of this kind already, or one of a more urgent kind that waits for
        nothing."""
        urgency = self._kinds.index(kind)
        return {
            group.caller
            for group in self._groups
            if group.kind == kind or (self._kinds.index(group.kind) < urgency and not group.waits)
        }

    def _next_group(self) -> JobGroup | None:
        """Return the group of the most urgent kind of the caller that had the least time, of those with a step to
        run."""
        due = [group for group in self._groups if group.is_due]
        for group in due:
            self._times.activate(group.caller)
        if not due:
            return None
        caller = self._times.first()
        groups = [group for group in due if group.caller == caller]
        return min(groups, key=lambda group: self._kinds.index(group.kind))

    def _deactivate_if_idle(self, caller: str) -> None:
        """Take a caller out of the division of time while it has no job, or all of them wait: it does not save up the
        time in which it waits."""
        if not any(group.caller == caller and not group.waits for group in self._groups):
            self._times.deactivate(caller)

    def start(self, delivery: Delivery) -> None:
        """Claim a job, and with an edit this worker's share of the waiting edits of its caller, and make their
        stepper."""
        members = self._claim(delivery)
        if delivery.kind == "edit" and self._max_edits_per_group > 1:
            members |= self._claim_more_edits(delivery.caller)
        if members:
            reporter = ReportQueue()
            steps = self._handlers[delivery.kind](reporter, *(job for _, job in members.values()))
            self._groups.append(JobGroup(delivery.kind, delivery.caller, members, reporter, steps))
            self._times.activate(delivery.caller)

    def _claim_more_edits(self, caller: str) -> JobsById:
        """Claim an equal part of the caller's waiting edits for each edit worker. Those that cannot be claimed wait
        again."""
        members: JobsById = {}
        deliveries: list[Delivery] = []
        try:
            waiting = self._broker.queue_depth("edit", caller)
            share = -(-(waiting + 1) // self._workers.count_edit_workers())
            if (count := min(self._max_edits_per_group, share) - 1) > 0:
                deliveries = self._broker.receive(("edit",), count, 0, CallerFilter(only=caller))
            while deliveries:
                members |= self._claim(deliveries[0])
                deliveries.pop(0)
        except (Unavailable, OSError):
            for delivery in deliveries:
                self._outbox.defer(self._broker.nack, delivery)
        return members

    def _claim(self, delivery: Delivery) -> JobsById:
        """Return the claimed job, or nothing when it needs no work."""
        try:
            job = self._job_store.claim(delivery.job_id)
        except Unavailable:
            raise
        except Exception:  # the row is unchanged: the sweep finds it again
            log.exception("job cannot be started", extra={"job": delivery.job_id})
            job = None
        if job is None:
            self._outbox.acknowledge(delivery)
            return {}
        log.info("job started", extra={**log_fields(job), "kind": job.kind, "attempt": job.attempt})
        return {job.id: (delivery, job)}

    def step(self) -> None:
        """Run one step of the next group. An error of the step ends its jobs and nothing else."""
        group = self._next_group()
        if group is None:
            return
        started = time.monotonic()
        try:
            if all(self._job_store.cancel_requested(job) for job in group.jobs):
                raise Cancelled("the job was cancelled while it ran.")
            outcome = advance(group.steps)
            group.phase = str(Phase.COMMIT if isinstance(outcome, StepperResult) else outcome.phase)
            check_step(self._replica, f"{group.kind} {group.phase}")
        except DigestMismatch:
            raise
        except Exception as error:
            self._apply_reports(group)
            if isinstance(error, Unavailable):
                self._interrupt(group, error)
            else:
                self._finish_group(group, error)
        else:
            seconds = time.monotonic() - started
            self._times.add(group.caller, seconds, JOB_KINDS[group.kind].time_weight)
            waits = isinstance(outcome, Progress) and outcome.waiting
            group.resumes_at = time.monotonic() + WAIT_INTERVAL if waits else None
            self._deactivate_if_idle(group.caller)
            _observe_step(group.phase, seconds)
            self._apply_reports(group)
            if isinstance(outcome, StepperResult):
                self._finish_group(group)
        self._outbox.flush()

    def _apply_reports(self, group: JobGroup) -> None:
        """Publish the progress that the last step reported, and end the jobs that it reported as finished."""
        while group.reporter.reports:
            job_id, report = group.reporter.reports.popleft()
            if isinstance(report, Progress):
                self._outbox.defer(self._report_progress, group, job_id, report)
            else:
                self._finish_job(group, job_id, report)

    def _report_progress(self, group: JobGroup, job_id: str, progress: Progress) -> None:
        if job_id not in group.members:
            return
        try:
            self._job_store.report_progress(group.members[job_id][1], progress)
        except LeaseLost as error:
            self._finish_job(group, job_id, error)

    def _interrupt(self, group: JobGroup, error: Unavailable) -> None:
        """Requeue the jobs of a group after an outage, a bounded number of times; then they fail.

        Beside other groups the cause can be the memory that these hold. Then this is not counted, and nothing starts
        until one of them has ended.
        """
        alone = self._groups == [group]
        for job in group.jobs:
            log.warning("job interrupted", extra={**log_fields(job), "detail": error.detail})
            self._interruptions[job.id] += alone
            if self._interruptions[job.id] >= MAX_INTERRUPTIONS:
                self._finish_job(group, job.id, error)
        self._requeue(group)
        self._starts_nothing = not alone

    def _finish_group(self, group: JobGroup, error: Exception | None = None) -> None:
        """End all jobs of a group that have not ended."""
        for job in group.jobs:
            self._finish_job(group, job.id, error)
        self._drop(group)

    def _finish_job(self, group: JobGroup, job_id: str, error: Exception | None = None) -> None:
        """End one job of a group and acknowledge its delivery."""
        if job_id not in group.members:
            return
        delivery, job = group.members.pop(job_id)
        if error is None:
            log.info("job ended", extra=log_fields(job))
        else:
            self._fail(job, error)
        self._on_job_end()
        self._interruptions.pop(job_id, None)
        self._outbox.acknowledge(delivery, "end.after_publish")
        if not group.members:
            self._drop(group)

    def _fail(self, job: ClaimedJob, error: Exception) -> None:
        """Write the error of a job to its row, unless another worker has taken the job over."""
        fields = log_fields(job)
        if isinstance(error, Cancelled):
            log.info("job cancelled", extra=fields)
            self._outbox.defer(self._write_end, self._job_store.finish, job, "cancelled", None)
        elif isinstance(error, LeaseLost):
            log.warning("job taken over by another worker", extra=fields)
        elif isinstance(error, PalimpsestError):
            log.info("job failed", extra={**fields, "detail": error.detail})
            self._outbox.defer(self._write_end, self._job_store.fail, job, error)
        else:
            log.error("job failed", exc_info=error, extra=fields)
            self._outbox.defer(self._write_end, self._job_store.fail, job, error)

    def _write_end(self, action: Callable[..., None], job: ClaimedJob, *arguments: object) -> None:
        """Write the end of a job. When that fails for a reason other than an outage, the sweep finds the job again."""
        try:
            action(job, *arguments)
        except (PalimpsestError, OSError):
            raise
        except Exception:
            log.exception("end of job cannot be written", extra=log_fields(job))
            self._job_store.forget_locally(job)

    def requeue_all(self) -> None:
        """Requeue all jobs, as if they had not been started."""
        for group in self._groups[::-1]:
            self._requeue(group)

    def _requeue(self, group: JobGroup) -> None:
        self._drop(group)
        for delivery, job in group.members.values():
            log.info("job requeued", extra=log_fields(job))
            self._outbox.defer(self._write_end, self._job_store.requeue, job)
            self._outbox.acknowledge(delivery)

    def _drop(self, group: JobGroup) -> None:
        group.steps.close()
        if group in self._groups:
            self._groups.remove(group)
            self._deactivate_if_idle(group.caller)
        self._starts_nothing = False


def _observe_step(phase: str, seconds: float) -> None:
    metrics.ENGINE_STEP_SECONDS.labels("job").observe(seconds)
    metrics.JOB_STEP_SECONDS.labels(phase).observe(seconds)
