"""Runs generations and comparisons: admits them, steps them, publishes their events, and releases them.

A call waits for its version to be built, one step at a time, so that building never delays the tokens of other calls.
Another worker may take over a call whose lease has expired; such a call is dropped without an event.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from service.engine.batch_executor import BatchExecutor
from service.engine.calls import (
    PendingAdmission,
    RunningCall,
    RunningComparison,
    RunningGeneration,
    log_fields,
)
from service.engine.comparison import run_comparison
from service.engine.decoding import DecodingSequence, TokenOutput, new_sequences
from service.engine.outbox import Outbox
from service.engine.scheduler import MAX_LIGHT_SEQUENCES, MAX_PREFILL_TOKENS, Scheduler
from service.engine.step_guard import check_step
from service.engine.versioned_model import VersionedModel
from service.errors import (
    Cancelled,
    DigestMismatch,
    InvalidInput,
    PalimpsestError,
    Unavailable,
    error_document,
)
from service.jobs.broker import Broker, Delivery
from service.kit import crash_points, metrics
from service.kit.steps import Progress, Stepper, advance
from service.kit.time_share import TimeShare
from service.kit.versions import resolve_version
from service.kit.virtual_times import VirtualTimes
from service.models import memory_estimates
from service.patches.patch import PatchSet
from service.schemas import WorkerCompareRequest, WorkerGenerateRequest

log = logging.getLogger(__name__)

GENERATION_TIME_SHARE = 0.6  # of the time of calls, for generations beside comparisons
GENERATION_HEAD_START = 0.1  # seconds, before comparisons
COMPARISON_HEAD_START = 0.2  # seconds, of a caller before the comparisons of others
WORKER_STOPPING = Unavailable("the worker is stopping: send the request again.")


class CallRunner:
    """The calls of one engine."""

    def __init__(
        self,
        replica: VersionedModel,
        broker: Broker,
        outbox: Outbox,
        *,
        max_batch_size: int,
        max_comparisons: int,
        kv_memory_fraction: float,
        cancel_poll_interval: float,
        single_process: bool,
    ) -> None:
        self._replica = replica
        self._broker = broker
        self._outbox = outbox
        self._max_batch_size = max_batch_size
        self._max_comparisons = max_comparisons
        free = memory_estimates.free_bytes_for_blocks(replica.base)
        self._kv_memory_bytes = None if free is None else int(free * kv_memory_fraction)
        self._cancel_poll_interval = cancel_poll_interval
        self._last_cancel_poll = float("-inf")
        self._single_process = single_process
        self._admissions: deque[PendingAdmission] = deque()
        self._sequence_owners: dict[DecodingSequence, tuple[RunningGeneration, int]] = {}
        self._comparisons: list[RunningComparison] = []
        self._comparison_times = VirtualTimes(COMPARISON_HEAD_START)
        self._comparison_time_share = TimeShare(GENERATION_TIME_SHARE, GENERATION_HEAD_START)
        self._reset_batches()

    def _reset_batches(self) -> None:
        self._scheduler = Scheduler(
            self._max_batch_size,
            partial(memory_estimates.kv_cache_bytes, self._replica.base),
            self._kv_memory_bytes,
        )
        self._executor = BatchExecutor(self._replica, self._scheduler)

    @property
    def active(self) -> bool:
        """Whether a generation is decoding or a comparison is running."""
        return bool(self._scheduler or self._comparisons)

    @property
    def has_light_work(self) -> bool:
        """Whether a caller with few sequences, or with a comparison, waits for steps."""
        return bool(self._comparisons) or self._scheduler.has_light_work

    @property
    def pending(self) -> bool:
        """Whether a call waits for its version to be built."""
        return bool(self._admissions)

    @property
    def calls(self) -> list[RunningCall]:
        """All calls that this worker holds."""
        waiting = [a.call for a in self._admissions]
        owners = [generation for generation, _ in self._sequence_owners.values()]
        return list(dict.fromkeys([*owners, *waiting, *self._comparisons]))

    def can_admit(self, kind: str) -> bool:
        """Return whether a call of some caller can be admitted."""
        if kind == "generate":
            return self._scheduler.is_open and self._waiting_sequences().total() < self._max_batch_size
        return len(self._running_comparisons()) < self._max_comparisons

    def busy_callers(self, kind: str) -> set[str]:
        """Return the callers of whom no further call can be admitted now.

        Several comparisons of one caller would only share its time.
        """
        if kind == "generate":
            waiting = self._waiting_sequences()
            many = {caller for caller, count in waiting.items() if count >= MAX_LIGHT_SEQUENCES}
            return self._scheduler.busy_callers() | many
        return {comparison.delivery.caller for comparison in self._running_comparisons()}

    def _waiting_sequences(self) -> Counter[str]:
        """Return how many sequences of each caller wait for their version."""
        generations = [a.call for a in self._admissions if isinstance(a.call, RunningGeneration)]
        return Counter(call.delivery.caller for call in generations for _ in call.sequences)

    def _running_comparisons(self) -> list[RunningComparison]:
        """Return all comparisons, also those that wait for their versions."""
        waiting = [a.call for a in self._admissions if isinstance(a.call, RunningComparison)]
        return [*self._comparisons, *waiting]

    # admission

    def start(self, delivery: Delivery) -> None:
        """Admit a call. An invalid call ends with an error; only errors that concern all calls are raised."""
        for call in self.calls:
            if call.channel == delivery.job_id:  # its lease expired while this process was suspended
                self._drop(call)
        try:
            if delivery.kind == "generate":
                self._admit(self._new_generation(delivery))
            else:
                self._admit(self._new_comparison(delivery))
        except (Unavailable, DigestMismatch):
            raise
        except Exception as error:
            self._fail(delivery, error)

    def _new_generation(self, delivery: Delivery) -> PendingAdmission:
        request = WorkerGenerateRequest.model_validate(delivery.payload)
        version = resolve_version(request.version, self._replica.head(), request.min_version)
        model = self._replica.base
        sequences = new_sequences(model, request)
        needed = memory_estimates.kv_cache_bytes(model, 1, max(s.max_length for s in sequences))
        if (
            request.echo and request.logprobs is not None
        ):  # the distributions at all positions of a prefill group
            longest = max(len(s.prompt_ids) for s in sequences)
            needed += memory_estimates.scoring_bytes(model, 1, max(MAX_PREFILL_TOKENS, longest))
        memory_estimates.require_memory(
            "this generation", needed, model.device, "ask for fewer tokens", "max_new_tokens"
        )
        generation = RunningGeneration(delivery, request, version, sequences)

        def begin(patch: dict[int, PatchSet]) -> None:
            self._executor.add(patch[version], sequences, delivery.caller, delivery.cost)

        self._sequence_owners |= {s: (generation, i) for i, s in enumerate(sequences)}
        return PendingAdmission(generation, (version,), begin, unrouted=deque(sequences))

    def _new_comparison(self, delivery: Delivery) -> PendingAdmission:
        request = WorkerCompareRequest.model_validate(delivery.payload)
        head = self._replica.head()
        a, b = (resolve_version(v, head) for v in request.versions)
        patch: dict[int, PatchSet] = {}

        def stepper() -> Stepper[dict[str, Any]]:
            sides = ((a, patch[a]), (b, patch[b]))
            return (yield from run_comparison(self._replica.base, self._replica.use_patch, request, sides))

        comparison = RunningComparison(delivery, stepper())

        def begin(built: dict[int, PatchSet]) -> None:
            patch.update(built)
            self._comparisons.append(comparison)
            self._comparison_times.activate(delivery.caller)

        return PendingAdmission(comparison, (a, b), begin)

    def _admit(self, admission: PendingAdmission) -> None:
        """Start a call whose versions are built already, unless they route prompts; queue it otherwise."""
        for version in admission.versions:
            if self._replica.is_built(version):
                admission.add_patch(version, self._replica.built_patch(version))
        if admission.next_version is None and not admission.unrouted:
            self._begin(admission)
        else:
            self._admissions.append(admission)

    def _begin(self, admission: PendingAdmission) -> None:
        admission.start(admission.patches)
        if isinstance(admission.call, RunningGeneration):
            crash_points.crash_point("generate.after_admit")

    def step(self) -> None:
        """Run one step of building the version that the first waiting call needs, or route one of its prompts."""
        if not self._admissions:
            return
        admission = self._admissions[0]
        version = admission.next_version
        try:
            if version is not None:
                if not self._replica.advance_build(version):
                    return
                admission.add_patch(version, self._replica.built_patch(version))
            elif admission.unrouted:
                (patch,) = admission.patches.values()
                with self._replica.use_patch(PatchSet(records=patch.records)) as model:
                    admission.unrouted.popleft().choose_route(model)
            if admission.next_version is None and not admission.unrouted:
                self._admissions.popleft()
                self._begin(admission)
        except (Unavailable, DigestMismatch):
            raise
        except Exception as error:
            self._drop(admission.call)
            self._fail(admission.call.delivery, error)
            self._outbox.flush()

    # steps

    def decode(self) -> None:
        """Prefill at most one group of sequences and decode one token of every running sequence."""
        started = time.monotonic()
        for outputs in self._executor.step():
            check_step(self._replica, "decode")
            self._emit_tokens(outputs)
            self._outbox.flush()
            if outputs:
                crash_points.crash_point("generate.after_token")
        self._comparison_time_share.add_foreground(time.monotonic() - started)

    def _emit_tokens(self, outputs: Sequence[TokenOutput]) -> None:
        """Publish the tokens of one batch, then the ends of the generations that they finish."""
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
        """Publish the ends of generations, then acknowledge them."""
        for generation in generations:
            crash_points.crash_point("generate.before_end")
            self._drop(generation)
            self._publish_end(generation)
        for generation in generations:
            self._outbox.acknowledge(generation.delivery, "generate.after_end")

    def _publish_end(self, generation: RunningGeneration) -> None:
        """A generation fails as a whole when one of its sequences failed."""
        for s in generation.sequences:
            metrics.GENERATIONS_FINISHED.labels(s.finish_reason).inc()
        if any(s.finish_reason == "error" for s in generation.sequences):
            error = Unavailable(
                f"version {generation.version} failed to generate: the worker's log has the details. Send the request "
                "again."
            )
            self._outbox.publish(generation.channel, "error", error_document(error), last=True)
            return
        event = generation.end_event()
        self._outbox.publish(generation.channel, "end", event, last=True)
        fields = {"version": generation.version, "seconds": event["seconds"], **event["usage"]}
        log.info("generation ended", extra={**log_fields(generation.delivery), **fields})

    def step_comparisons(self) -> None:
        """Run one step of a comparison of the caller with the least time, when it is due beside generations."""
        has_generations = bool(self._scheduler)
        if not self._comparisons or (has_generations and not self._comparison_time_share.background_is_due):
            return
        caller = self._comparison_times.first()
        comparison = next(c for c in self._comparisons if c.delivery.caller == caller)
        started = time.monotonic()
        try:
            outcome = advance(comparison.steps)
            check_step(self._replica, "compare")
            if isinstance(outcome, Progress):
                return
            self._outbox.publish(comparison.channel, "end", outcome.result, last=True)
            self._outbox.acknowledge(comparison.delivery)
        except Exception as error:
            self._fail(comparison.delivery, error)
        finally:
            seconds = time.monotonic() - started
            self._comparison_time_share.add_background(seconds, has_generations)
            self._comparison_times.add(caller, seconds)
        self._drop(comparison)
        self._outbox.flush()

    # cancellation and release

    def poll_cancellations(self) -> None:
        """Drop the calls that another worker has taken over, and end those that were cancelled."""
        now = time.monotonic()
        if now - self._last_cancel_poll < self._cancel_poll_interval:
            return
        self._last_cancel_poll = now
        for call in self.calls:
            if not self._broker.holds_lease(call.delivery):
                log.warning("call taken over by another worker", extra=log_fields(call.delivery))
                self._drop(call)
                self._outbox.defer(self._broker.ack, call.delivery)  # only clears the broker's local state
            elif self._broker.cancelled(call.channel):
                self._cancel(call)
        self._outbox.flush()

    def _cancel(self, call: RunningCall) -> None:
        if isinstance(call, RunningGeneration):
            call.cancel()
            self._finish_generations([call])
        else:
            self._drop(call)
            self._fail(call.delivery, Cancelled("the comparison was cancelled."))

    def _fail(self, delivery: Delivery, error: Exception) -> None:
        """End a call with an error event."""
        if isinstance(error, ValidationError):
            error = InvalidInput(
                "the worker does not understand the request: update the worker with the API."
            )
        if not isinstance(error, PalimpsestError):
            log.error("call failed", exc_info=error, extra={**log_fields(delivery), "kind": delivery.kind})
        self._outbox.publish(delivery.job_id, "error", error_document(error), last=True)
        self._outbox.acknowledge(delivery)

    def _drop(self, call: RunningCall) -> None:
        """Forget a call, without an event."""
        self._admissions = deque(a for a in self._admissions if a.call is not call)
        if isinstance(call, RunningComparison):
            call.steps.close()
            if call in self._comparisons:
                self._comparisons.remove(call)
                if all(other.delivery.caller != call.delivery.caller for other in self._comparisons):
                    self._comparison_times.deactivate(call.delivery.caller)
            return
        for s in call.sequences:
            self._sequence_owners.pop(s, None)
        call.cancel()

    def release_all(self) -> None:
        """Release all calls to other workers. In a single process, end those whose client has received output."""
        for call in self.calls:
            has_output = isinstance(call, RunningGeneration) and call.has_output
            self._drop(call)
            if self._single_process and has_output:
                self._fail(call.delivery, WORKER_STOPPING)
            else:
                self._outbox.defer(self._broker.nack, call.delivery)
        self._reset_batches()
