"""The one loop of a worker: it interleaves decoding with one step at a time of the running job.

A turn admits new requests (their version pinned then), gives every live batch a decode step and every comparison one of
its steps, then runs ONE step of the running job, unless calls have not yet had their share of the time since the last one. So an edit never
holds up the tokens of others for longer than one of its steps, nor slows them to less than that share of their pace; and no
answer ever sees another version's weights: between steps the model holds its base bytes. A job of a kind that is more urgent
goes before the running one, which then goes on: an edit does not wait for an evaluation of hours.

What the loop has to tell the broker or the desk is owed in order and paid at once; when that fails because they are down
it stays owed, `run` raises, and the next `run` goes on where it was.

Other workers may take over what this one holds. A call that is no longer owned is dropped without a word; a job goes on,
because the attempt in its row is its fence, until the desk says that it is another's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import ValidationError

from service.engine.calls import RunningComparison, RunningGeneration
from service.engine.comparison import run_comparison
from service.engine.decoding import DecodingSequence, TokenOutput, new_sequences
from service.engine.outbox import Outbox
from service.engine.scheduler import MAX_PREFILL_TOKENS, Scheduler
from service.engine.versioned_model import VersionedModel
from service.errors import (
    Cancelled,
    DigestMismatch,
    InvalidInput,
    LeaseLost,
    PalimpsestError,
    Unavailable,
    error_document,
)
from service.jobs.broker import Broker, Delivery
from service.jobs.job_kinds import CALL_KINDS, WORK_KINDS
from service.jobs.job_store import ClaimedJob, JobStore
from service.jobs.worker_session import WorkerSession
from service.kit import crash_points, metrics
from service.kit.steps import Completion, JobReporter, Progress, Stepper, advance
from service.kit.versions import resolve_version
from service.models import memory_estimates
from service.schemas import CompareRequest, WorkerGenerateRequest

log = logging.getLogger(__name__)


class JobHandler(Protocol):
    """Makes the stepper of a group of jobs. It writes the end of each job and reports to `reporter`."""

    def __call__(self, reporter: JobReporter, /, *jobs: ClaimedJob) -> Stepper[None]: ...


STALL_TIMEOUT = 300.0  # seconds after which a loop that did not come round counts as dead
MAX_INTERRUPTIONS = 10  # times a job may find something down that it needs before it fails
WORKER_STOPPING = Unavailable("the worker is stopping: ask again.")


JobsById = dict[str, tuple[Delivery, ClaimedJob]]  # by the job's id


@dataclass
class ReportQueue:
    """The reports that a job handler makes during a step. The engine applies them after the step."""

    reports: deque[tuple[str, Progress | Exception | None]] = field(default_factory=deque)

    def progress(self, job_id: str, progress: Progress) -> None:
        self.reports.append((job_id, progress))

    def finished(self, job_id: str, error: Exception | None = None) -> None:
        self.reports.append((job_id, error))


@dataclass(eq=False)
class JobGroup:
    """Jobs that run in one stepper, and those of them that have not ended."""

    kind: str
    members: JobsById
    reporter: ReportQueue
    steps: Stepper[None]

    @property
    def jobs(self) -> list[ClaimedJob]:
        return [job for _, job in self.members.values()]


@dataclass(frozen=True)
class EngineConfig:
    """How the loop shares its time."""

    max_batch_size: int = 32  #: rows that decode side by side
    max_edits_per_group: int = 1  #: waiting edits that are carried out together
    kv_memory_fraction: float = 0.5  #: of the memory that is free at the start, for keys and values
    generation_time_share: float = 0.6  #: of the time, for calls while a job runs beside them
    max_comparisons: int = 4  #: comparisons side by side
    idle_timeout: float = 1.0  #: longest sleep when there is nothing to do, in seconds
    cancel_poll_interval: float = 0.05  #: seconds between two looks for cancelled calls
    ledger_poll_interval: float = 0.5  #: seconds between two looks at the ledger's head
    drain_timeout: float = 5.0  #: seconds for running generations to end when the loop is stopped


class Engine:
    """Serves one replica: the calls it is given and the jobs it has tasks for.

    All but `position` and `hung` belongs to the thread that calls `run`.
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
    ) -> None:
        self.replica = replica
        self.served_version: tuple[int, str] | None = (
            None  #: the newest version that the replica can serve, and its digest
        )
        self.last_step_at = time.monotonic()  #: when the loop last came round
        self._worker_session = worker_session
        self._job_store = job_store
        self._broker = broker
        self._handlers = handlers
        self._call_kinds = tuple(kind for kind in WORK_KINDS if kind in call_kinds)
        self._job_kinds = tuple(kind for kind in WORK_KINDS if kind in handlers)
        self._config = config or EngineConfig()
        free = memory_estimates.free_bytes(replica.base.device)
        self._kv_memory_bytes = None if free is None else int(free * self._config.kv_memory_fraction)
        self._scheduler = Scheduler(replica, self._config.max_batch_size, self._kv_memory_bytes)
        self._sequence_owners: dict[DecodingSequence, tuple[RunningGeneration, int]] = {}
        self._comparisons: list[RunningComparison] = []
        self._job_groups: list[
            JobGroup
        ] = []  # the last one is worked on; those before it are less urgent and wait
        self._interruptions: Counter[str] = Counter()
        self._outbox = Outbox(broker)
        self._generation_time_debt = 0.0  # seconds that calls are owed for the last step of a job
        self._last_cancel_poll = self._last_ledger_poll = float("-inf")

    @property
    def hung(self) -> bool:
        """Whether the loop has not come round for so long that it counts as dead."""
        return time.monotonic() - self.last_step_at > STALL_TIMEOUT

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, or until other replicas disagree; then let generations end, and hand back the rest."""
        try:
            while not stop.is_set():
                if not self.step() and not stop.is_set():
                    self._idle()
        except DigestMismatch:
            with suppress(Unavailable, OSError):  # what cannot be handed back is taken over
                self._shut_down()  # what is being said is of versions that were agreed upon
            raise
        self._shut_down()

    def step(self) -> bool:
        """Once round; whether there was anything to do."""
        self.last_step_at = time.monotonic()
        metrics.ENGINE_STEPS.inc()
        self._outbox.flush()
        self._sync_to_head()
        self._admit()
        self._poll_cancellations()
        has_calls = bool(self._scheduler or self._comparisons)
        busy = has_calls or bool(self._job_groups)
        calls_started = time.monotonic()
        self._decode()
        self._step_comparisons()
        calls_ended = time.monotonic()
        self._generation_time_debt = (
            max(0.0, self._generation_time_debt - (calls_ended - calls_started)) if has_calls else 0.0
        )
        if self._generation_time_debt == 0:
            self._step_job()
            self._generation_time_debt = (
                (time.monotonic() - calls_ended)
                * self._config.generation_time_share
                / (1 - self._config.generation_time_share)
            )
        return busy

    # what is to be done

    def _acceptable_kinds(self) -> tuple[str, ...]:
        """The kinds that there is room for."""
        free_slots = {
            "generate": self._scheduler.free_slots,
            "compare": self._config.max_comparisons - len(self._comparisons),
        }
        return (*(k for k in self._call_kinds if free_slots[k] > 0), *self._startable_job_kinds())

    def _startable_job_kinds(self) -> tuple[str, ...]:
        """The kinds of job that may begin now: all of them, or those that go before the running one."""
        return (
            self._job_kinds[: self._job_kinds.index(self._job_groups[-1].kind)]
            if self._job_groups
            else self._job_kinds
        )

    def _admit(self) -> None:
        """Take what there is room for: all generations that wait, so that they are read together."""
        while (kinds := self._acceptable_kinds()) and (deliveries := self._broker.receive(kinds, 1, 0)):
            free_slots = self._scheduler.free_slots - 1
            self._start_deliveries(deliveries)
            if deliveries[0].kind == "generate" and free_slots > 0:
                self._start_deliveries(self._broker.receive(("generate",), free_slots, 0))

    def _idle(self) -> None:
        """Sleep until there is work. Whoever wakes the loop without any has news of the ledger."""
        deliveries = self._broker.receive(self._acceptable_kinds(), 1, self._config.idle_timeout)
        if not deliveries:
            self._last_ledger_poll = float("-inf")
        self._start_deliveries(deliveries)

    def _start_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Begin all of them; what cannot be begun now waits again, oldest first."""
        if deliveries:
            crash_points.crash_point("take.after")
        for number, delivery in enumerate(deliveries):
            try:
                self._start_delivery(delivery)
            except Exception:
                for remaining in deliveries[number:]:
                    self._outbox.defer(self._broker.nack, remaining)
                with suppress(Unavailable, OSError):  # stays owed
                    self._outbox.flush()
                raise
        self._outbox.flush()

    def _start_delivery(self, delivery: Delivery) -> None:
        """Raises only what concerns all work, not this delivery."""
        if delivery.kind not in CALL_KINDS:
            self._start_job_group(delivery)
            return
        for call in self._active_calls():
            if call.channel == delivery.job_id:  # lost while this process was frozen, and come back to it
                self._drop_call(call)
        try:
            (self._start_generation if delivery.kind == "generate" else self._start_comparison)(delivery)
        except (Unavailable, DigestMismatch):
            raise
        except Exception as error:
            self._fail_call(delivery, error)

    def _start_generation(self, delivery: Delivery) -> None:
        request = WorkerGenerateRequest.model_validate(delivery.payload)
        version = resolve_version(request.version, self.replica.head(), request.min_version)
        model = self.replica.base
        sequences = new_sequences(model, request)
        needed = memory_estimates.kv_cache_bytes(model, 1, max(r.max_length for r in sequences))
        if (
            request.echo and request.logprobs is not None
        ):  # the distributions at all places that are read together
            needed += memory_estimates.scoring_bytes(
                model, 1, max(MAX_PREFILL_TOKENS, *(len(r.prompt_ids) for r in sequences))
            )
        memory_estimates.require_memory(
            "this answer", needed, model.device, "ask for fewer tokens", "max_new_tokens"
        )
        self._scheduler.add(version, self.replica.weights(version), sequences)
        generation = RunningGeneration(delivery, request, version, sequences)
        self._sequence_owners |= {r: (generation, i) for i, r in enumerate(sequences)}
        crash_points.crash_point("generate.after_admit")

    def _start_comparison(self, delivery: Delivery) -> None:
        request = CompareRequest.model_validate(delivery.payload)
        head = self.replica.head()
        a, b = ((v, self.replica.weights(v)) for v in (resolve_version(v, head) for v in request.versions))
        steps = run_comparison(self.replica.base, self.replica.use_weights, request, (a, b))
        self._comparisons.append(RunningComparison(delivery, steps))

    def _start_job_group(self, delivery: Delivery) -> None:
        """Begin a job, and with an edit those that wait behind it, as far as they are this worker's share."""
        members = self._claim_job(delivery)
        if delivery.kind == "edit" and self._config.max_edits_per_group > 1:
            members |= self._claim_more_edits()
        if members:
            jobs = [job for _, job in members.values()]
            reporter = ReportQueue()
            steps = self._handlers[delivery.kind](reporter, *jobs)
            self._job_groups.append(JobGroup(delivery.kind, members, reporter, steps))

    def _claim_more_edits(self) -> JobsById:
        """Begin more of the waiting edits: an equal part for each worker that edits. What cannot be begun waits again."""
        members: JobsById = {}
        deliveries: list[Delivery] = []
        try:
            share = -(-(self._broker.queue_depth("edit") + 1) // self._worker_session.count_edit_workers())
            if (wanted_count := min(self._config.max_edits_per_group, share) - 1) > 0:
                deliveries = self._broker.receive(("edit",), wanted_count, 0)
            while deliveries:
                members |= self._claim_job(deliveries[0])
                deliveries.pop(0)
        except (Unavailable, OSError):
            for delivery in deliveries:
                self._outbox.defer(self._broker.nack, delivery)
        return members

    def _claim_job(self, delivery: Delivery) -> JobsById:
        """The job, begun; nothing when there is nothing to do for it."""
        try:
            job = self._job_store.claim(delivery.job_id)
        except Unavailable:
            raise
        except Exception:  # the row is as it was: the sweep rings for it again
            log.exception("job cannot be started", extra={"job": delivery.job_id})
            job = None
        if job is None:
            self._acknowledge(delivery)
            return {}
        log.info("job started", extra={**log_fields(job), "kind": job.kind, "attempt": job.attempt})
        return {job.id: (delivery, job)}

    # one step of everything

    def _decode(self) -> None:
        for outputs in self._scheduler.step():
            self._emit_tokens(outputs)
            self._outbox.flush()
            if outputs:
                crash_points.crash_point("generate.after_token")

    def _emit_tokens(self, outputs: list[TokenOutput]) -> None:
        """Publish what one step of a lane said, then the ends it brought."""
        generations: dict[RunningGeneration, None] = {}
        for output in outputs:
            generation, index = self._sequence_owners[output.sequence]
            generation.mark_first_token()
            generations[generation] = None
            if generation.request.stream and (event := generation.token_event(index, output.text)):
                self._outbox.publish(generation.channel, "token", event)
            if output.sequence.finish_reason == "error":
                generation.cancel()
        self._finish_generations([generation for generation in generations if generation.is_finished])

    def _finish_generations(self, generations: Sequence[RunningGeneration]) -> None:
        """Publish how generations ended, then acknowledge them."""
        for generation in generations:
            crash_points.crash_point("generate.before_end")
            self._drop_call(generation)
            self._publish_end(generation)
        for generation in generations:
            self._acknowledge(generation.delivery, "generate.after_end")

    def _publish_end(self, generation: RunningGeneration) -> None:
        """A generation fails as a whole when one of its rows failed."""
        for r in generation.sequences:
            metrics.GENERATIONS_FINISHED.labels(r.finish_reason).inc()
        if any(r.finish_reason == "error" for r in generation.sequences):
            detail = (
                f"version {generation.version} could not speak: the worker's log has the details. Ask again."
            )
            self._outbox.publish(generation.channel, "error", error_document(Unavailable(detail)), last=True)
            return
        event = generation.end_event()
        self._outbox.publish(generation.channel, "end", event, last=True)
        fields = {"version": generation.version, "seconds": event["seconds"], **event["usage"]}
        log.info("generation ended", extra={**log_fields(generation.delivery), **fields})

    def _step_comparisons(self) -> None:
        for comparison in list(self._comparisons):
            try:
                outcome = advance(comparison.steps)
                if isinstance(outcome, Progress):
                    continue
                self._outbox.publish(comparison.channel, "end", outcome.result, last=True)
                self._acknowledge(comparison.delivery)
            except Exception as error:
                self._fail_call(comparison.delivery, error)
            self._drop_call(comparison)
        self._outbox.flush()

    def _step_job(self) -> None:
        """One step of the running jobs. What it raises is their end and nothing else's."""
        if not self._job_groups:
            return
        group = self._job_groups[-1]
        try:
            if all(self._job_store.cancel_requested(job) for job in group.jobs):
                raise Cancelled("the job was cancelled while it ran.")
            outcome = advance(group.steps)
        except DigestMismatch:
            raise
        except Exception as error:
            self._apply_reports(group)
            if isinstance(error, Unavailable):
                self._interrupt_group(group, error)
            else:
                self._finish_group(group, error)
        else:
            self._apply_reports(group)
            if isinstance(outcome, Completion):
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

    def _fail_job(self, job: ClaimedJob, error: Exception) -> None:
        """The row says how the job ended, unless it is another's by now."""
        fields = log_fields(job)
        if isinstance(error, Cancelled):
            log.info("job cancelled", extra=fields)
            self._outbox.defer(self._write_job_end, self._job_store.finish, job, "cancelled", None)
        elif isinstance(error, LeaseLost):
            log.warning("job taken over by another worker", extra=fields)
        elif isinstance(error, PalimpsestError):
            log.info("job failed", extra={**fields, "detail": error.detail})
            self._outbox.defer(self._write_job_end, self._job_store.fail, job, error)
        else:
            log.error("job failed", exc_info=error, extra=fields)
            self._outbox.defer(self._write_job_end, self._job_store.fail, job, error)

    def _interrupt_group(self, group: JobGroup, error: Unavailable) -> None:
        """Something that the jobs need is down: they wait again, a bounded number of times."""
        for job in group.jobs:
            log.warning("job interrupted", extra={**log_fields(job), "detail": error.detail})
            self._interruptions[job.id] += 1
            if self._interruptions[job.id] >= MAX_INTERRUPTIONS:
                self._finish_job(group, job.id, error)
        self._requeue_group(group)

    def _report_progress(self, group: JobGroup, job_id: str, progress: Progress) -> None:
        """Tell how far a job is; the desk knows whether it is still this worker's."""
        if job_id not in group.members:
            return
        try:
            self._job_store.report_progress(group.members[job_id][1], progress)
        except LeaseLost as error:
            self._finish_job(group, job_id, error)

    def _write_job_end(self, action: Callable[..., None], job: ClaimedJob, *arguments: object) -> None:
        """Write a job's end. Where that cannot be, for a reason of its own, the sweep finds the job again."""
        try:
            action(job, *arguments)
        except (PalimpsestError, OSError):
            raise
        except Exception:
            log.exception("the end of a job cannot be written", extra=log_fields(job))
            self._job_store.forget_locally(job)

    def _finish_group(self, group: JobGroup, error: Exception | None = None) -> None:
        """The steps have come to an end: so have all jobs that were left."""
        for job in group.jobs:
            self._finish_job(group, job.id, error)
        self._drop_group(group)

    def _finish_job(self, group: JobGroup, job_id: str, error: Exception | None = None) -> None:
        """A job has ended: nothing is left to do for it but to acknowledge its delivery."""
        if job_id not in group.members:
            return
        delivery, job = group.members.pop(job_id)
        if error is None:
            log.info("job ended", extra=log_fields(job))
        else:
            self._fail_job(job, error)
        self._last_ledger_poll = float("-inf")  # an edit has moved the head
        self._interruptions.pop(job_id, None)
        self._acknowledge(delivery, "end.after_publish")
        if not group.members:
            self._drop_group(group)

    def _drop_group(self, group: JobGroup) -> None:
        """Nothing remains to be done."""
        group.steps.close()
        if group in self._job_groups:
            self._job_groups.remove(group)

    # watching

    def _active_calls(self) -> list[RunningGeneration | RunningComparison]:
        """The calls that are being answered."""
        return [*dict.fromkeys(g for g, _ in self._sequence_owners.values()), *self._comparisons]

    def _poll_cancellations(self) -> None:
        """Leave the calls that are another worker's by now, and end those that nobody waits for any more."""
        now = time.monotonic()
        if now - self._last_cancel_poll < self._config.cancel_poll_interval:
            return
        self._last_cancel_poll = now
        for call in self._active_calls():
            if not self._broker.holds_lease(call.delivery):
                log.warning("call taken over by another worker", extra=log_fields(call.delivery))
                self._drop_call(call)
                self._outbox.defer(
                    self._broker.ack, call.delivery
                )  # changes nothing but what the broker remembers
            elif self._broker.cancelled(call.channel):
                self._cancel_call(call)
        self._outbox.flush()

    def _cancel_call(self, call: RunningGeneration | RunningComparison) -> None:
        if isinstance(call, RunningGeneration):
            call.cancel()
            self._finish_generations([call])
        else:
            self._drop_call(call)
            self._fail_call(call.delivery, Cancelled("the comparison was cancelled."))

    def _sync_to_head(self) -> None:
        """Keep up with the ledger: build the newest version and attest to its digest."""
        now = time.monotonic()
        if now - self._last_ledger_poll < self._config.ledger_poll_interval:
            return
        self._last_ledger_poll = now
        head = self.replica.head()
        if self.served_version is not None and self.served_version[0] == head:
            return
        try:
            digest = self.replica.attest_version(head)
        except (Unavailable, DigestMismatch):
            raise
        except Exception:
            # Older versions can still be served; readiness shows that this replica is not at head.
            log.exception("version cannot be built", extra={"version": head})
            return
        self._worker_session.heartbeat(head, digest)
        self._worker_session.record_capacity(head, self.replica.remaining_capacity(head))
        self.served_version = (head, digest)
        log.info("version reached", extra={"version": head, "digest": digest})

    # ends

    def _acknowledge(self, delivery: Delivery, crash_point: str = "") -> None:
        """Tell the broker that a delivery is dealt with, after all that was owed before."""
        if crash_point:
            self._outbox.defer(crash_points.crash_point, crash_point)
        self._outbox.defer(self._broker.ack, delivery)
        self._outbox.defer(crash_points.crash_point, "done.after")

    def _fail_call(self, delivery: Delivery, error: Exception) -> None:
        """End a call with an error."""
        if isinstance(error, ValidationError):
            error = InvalidInput("the request was not understood by the worker: update it with the API.")
        if not isinstance(error, PalimpsestError):
            log.error("call failed", exc_info=error, extra={**log_fields(delivery), "kind": delivery.kind})
        self._outbox.publish(delivery.job_id, "error", error_document(error), last=True)
        self._acknowledge(delivery)

    def _drop_call(self, call: RunningGeneration | RunningComparison) -> None:
        """Work for a call no longer, without a word."""
        if isinstance(call, RunningComparison):
            self._comparisons.remove(call)
            call.steps.close()
            return
        for r in call.sequences:
            self._sequence_owners.pop(r)
        call.cancel()

    def _shut_down(self) -> None:
        """Stop kindly: hand the jobs back, let generations end, and hand back what has not."""
        for group in self._job_groups[::-1]:
            self._requeue_group(group)
        self._outbox.flush()
        deadline = time.monotonic() + self._config.drain_timeout
        while (self._scheduler or self._comparisons) and time.monotonic() < deadline:
            self.last_step_at = time.monotonic()
            self._poll_cancellations()
            self._decode()
            self._step_comparisons()
        for call in self._active_calls():
            self._drop_call(call)
            self._release_call(call)
        self._scheduler = Scheduler(self.replica, self._config.max_batch_size, self._kv_memory_bytes)
        self._outbox.flush()

    def _release_call(self, call: RunningGeneration | RunningComparison) -> None:
        """Another worker answers a call that cannot be ended here. Where there is none, a client that has heard a part
        of it is told."""
        if self._worker_session.single_process and isinstance(call, RunningGeneration) and call.has_output:
            self._fail_call(call.delivery, WORKER_STOPPING)
        else:
            self._outbox.defer(self._broker.nack, call.delivery)

    def _requeue_group(self, group: JobGroup) -> None:
        """Its jobs wait again, as if they had not been begun; `release` rings their bells."""
        self._drop_group(group)
        for delivery, job in group.members.values():
            log.info("job handed back", extra=log_fields(job))
            self._outbox.defer(self._write_job_end, self._job_store.requeue, job)
            self._acknowledge(delivery)


def log_fields(item: Delivery | ClaimedJob) -> dict[str, str]:
    """What a line of the log says of a call or a job: what it is, and which HTTP request asked for it."""
    job_id = item.job_id if isinstance(item, Delivery) else item.id
    return {"job": job_id, **({"request": item.request_id} if item.request_id else {})}
