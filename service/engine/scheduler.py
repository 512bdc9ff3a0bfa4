"""Which sequences are prefilled and decoded in the next step. Pure bookkeeping: no tensors and no model.

A batch has sequences of one model, which is anything with a hash here: the edited weights that are in place while it is
stepped. Versions that differ in gated edits alone have the same ones. A step prefills at most one group of new
sequences and gives the batches that are due one decode step.

A caller with few sequences is not delayed by one with many. When a sequence is prefilled, it joins the light lane if
its caller has few sequences, and the heavy lane otherwise. Each lane has its own places and batches. While the light
lane has work, the heavy lane has the rest of a fixed share of the time. Waiting sequences are in an order that is fair
between callers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from service.engine.decoding import DecodingSequence
from service.kit.fair_queue import FairQueue
from service.kit.time_share import TimeShare

MAX_PREFILL_TOKENS = 1024  # prompt tokens of one prefill step, padding included
MAX_PREFILL_SEQUENCES = 16  # sequences of one prefill step
MAX_LIGHT_SEQUENCES = 4  # sequences of one caller in the light lane
LIGHT_TIME_SHARE = 0.6  # of the time of generations, for the light lane beside the heavy one
LIGHT_HEAD_START = 0.1  # seconds
HEAVY_MEMORY_SHARE = 0.75  # of the memory of keys and values, for the heavy lane

#: the bytes of keys and values of a batch: (sequences, positions) -> bytes
KvBytes = Callable[[int, int], int]


class Lane(StrEnum):
    """A class of sequences, by how many their caller has."""

    LIGHT = "light"
    HEAVY = "heavy"


@dataclass(frozen=True)
class BatchKey:
    """Names a batch: sequences with the same weights in one lane."""

    weights: Hashable
    lane: Lane


@dataclass(eq=False)
class LaneState:
    """The sequences of one lane that were prefilled."""

    running: dict[Hashable, list[DecodingSequence]] = field(default_factory=dict)  #: by weights
    #: with their weights; prefilled again one by one after an error
    to_retry: deque[tuple[Hashable, DecodingSequence]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.to_retry) + sum(map(len, self.running.values()))

    @property
    def running_count(self) -> int:
        return sum(map(len, self.running.values()))

    def sequences(self) -> Iterator[DecodingSequence]:
        for sequences in self.running.values():
            yield from sequences
        yield from (sequence for _, sequence in self.to_retry)


@dataclass(frozen=True)
class PrefillGroup:
    """Sequences of one batch that are prefilled together."""

    batch: BatchKey
    sequences: list[DecodingSequence]


@dataclass(frozen=True)
class StepPlan:
    """What the next step executes."""

    prefill: PrefillGroup | None
    decode: list[BatchKey]  #: batches whose sequences decode one token

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


class Scheduler:
    """Bounds the running sequences of each lane by `max_batch_size`, and all by the memory of their keys and values."""

    def __init__(self, max_batch_size: int, kv_bytes: KvBytes, kv_memory_bytes: int | None = None) -> None:
        self._lanes = {lane: LaneState() for lane in Lane}
        self._waiting: FairQueue[DecodingSequence, Hashable] = FairQueue()  # with their weights
        self._max_batch_size = max_batch_size
        self._kv_bytes = kv_bytes
        self._kv_memory_bytes = kv_memory_bytes  # None: unknown, not bounded
        self._time_share = TimeShare(LIGHT_TIME_SHARE, LIGHT_HEAD_START)
        self._heavy_lane_is_behind = False
        self._light_lane_has_work = False  # in the last step

    def __bool__(self) -> bool:
        return bool(self._waiting) or any(self._lanes.values())

    @property
    def has_light_work(self) -> bool:
        """Whether the light lane has sequences."""
        return bool(self._lanes[Lane.LIGHT]) or self._waiting_for(Lane.LIGHT) > 0

    # admission

    @property
    def is_open(self) -> bool:
        """Whether a call of a caller without sequences can be admitted."""
        return any(self._is_open(lane) for lane in Lane)

    def busy_callers(self) -> set[str]:
        """Return the callers whose calls are not admitted now: their sequences would wait here."""
        if self._is_open(Lane.HEAVY):
            return set()
        return {
            caller for caller, count in self._sequences_by_caller().items() if count >= MAX_LIGHT_SEQUENCES
        }

    def _is_open(self, lane: Lane) -> bool:
        """Return whether a sequence can join a lane.

        None joins the heavy lane while the last step left others waiting for it, so that workers share the waiting
        calls.
        """
        if lane is Lane.HEAVY and self._heavy_lane_is_behind:
            return False
        return len(self._lanes[lane]) + self._waiting_for(lane) < self._max_batch_size

    def _waiting_for(self, lane: Lane) -> int:
        return sum(other is lane for other in self._lanes_of_waiting().values())

    def _lanes_of_waiting(self) -> dict[DecodingSequence, Lane]:
        """Return the lane that each waiting sequence would join now, in their fair order."""
        counts = self._sequences_by_caller()
        return {
            sequence: Lane.LIGHT if counts[sequence.caller] <= MAX_LIGHT_SEQUENCES else Lane.HEAVY
            for sequence, _ in self._waiting
        }

    def _sequences_by_caller(self) -> Counter[str]:
        prefilled = (s.caller for state in self._lanes.values() for s in state.sequences())
        return Counter(prefilled) + Counter(s.caller for s, _ in self._waiting)

    def add(self, weights: Hashable, sequences: Sequence[DecodingSequence], caller: str, cost: float) -> None:
        """Queue the sequences of one call for their prefill, the shortest prompts first.

        `weights` identifies the edited weights and codebooks of their version. `cost` is that of the whole call,
        divided by the weight of its caller.
        """
        for sequence in sorted(sequences, key=lambda s: len(s.prompt_ids)):
            sequence.caller = caller
            self._waiting.add(sequence, weights, caller, cost / len(sequences))

    # steps

    def schedule(self) -> StepPlan:
        """Return the plan of the next step. The sequences of its prefill group leave the queue until `update`."""
        for sequence in [s for s, _ in self._waiting if s.finish_reason is not None]:
            self._waiting.remove(sequence)  # cancelled
        plan = self._plan_lane(Lane.LIGHT)
        self._light_lane_has_work = bool(plan)
        if not plan or self._time_share.background_is_due:
            heavy = self._plan_lane(Lane.HEAVY, prefill=plan.prefill is None)
            plan = StepPlan(plan.prefill or heavy.prefill, plan.decode + heavy.decode)
        self._heavy_lane_is_behind = bool(self._lanes[Lane.HEAVY].to_retry or self._waiting_for(Lane.HEAVY))
        return plan

    def _plan_lane(self, lane: Lane, prefill: bool = True) -> StepPlan:
        decode = [
            BatchKey(weights, lane) for weights, running in self._lanes[lane].running.items() if running
        ]
        return StepPlan(self._next_prefill_group(lane) if prefill else None, decode)

    def _next_prefill_group(self, lane: Lane) -> PrefillGroup | None:
        """Remove the next sequences to prefill together, all with the weights of the first one, and as many as fit."""
        state = self._lanes[lane]
        if state.to_retry:
            weights, sequence = state.to_retry.popleft()
            return PrefillGroup(BatchKey(weights, lane), [sequence])
        free = min(MAX_PREFILL_SEQUENCES, self._max_batch_size - state.running_count)
        group: list[DecodingSequence] = []
        batch: BatchKey | None = None
        width = 0
        lanes = self._lanes_of_waiting()
        for sequence, queued in self._waiting:
            if lanes[sequence] is not lane or (batch is not None and queued.item != batch.weights):
                continue
            batch = BatchKey(queued.item, lane)
            width = max(width, len(sequence.token_ids))
            too_wide = bool(group) and (len(group) + 1) * width > MAX_PREFILL_TOKENS
            if len(group) >= free or too_wide or not self._fits(batch, [*group, sequence]):
                break
            group.append(sequence)
        for sequence in group:
            self._waiting.remove(sequence)
        return PrefillGroup(batch, group) if batch is not None and group else None

    def record_time(self, lane: Lane, seconds: float) -> None:
        """Record the duration of a step of a batch."""
        if lane is Lane.LIGHT:
            self._time_share.add_foreground(seconds)
        else:
            self._time_share.add_background(seconds, self._light_lane_has_work)

    def update(self, batch: BatchKey, running: Sequence[DecodingSequence]) -> None:
        """Record the sequences of a batch that run after a step."""
        self._lanes[batch.lane].running[batch.weights] = list(running)

    def retry(self, batch: BatchKey, sequences: Sequence[DecodingSequence]) -> None:
        """Queue sequences whose step failed, to be prefilled again one by one."""
        self._lanes[batch.lane].to_retry.extend((batch.weights, sequence) for sequence in sequences)

    def batches(self) -> set[BatchKey]:
        """Return the batches with prefilled sequences."""
        batches = set()
        for lane, state in self._lanes.items():
            state.running = {weights: running for weights, running in state.running.items() if running}
            batches |= {
                BatchKey(weights, lane) for weights in {*state.running, *(w for w, _ in state.to_retry)}
            }
        return batches

    def sequences(self) -> Iterator[DecodingSequence]:
        """Yield all sequences that wait or run."""
        yield from (sequence for sequence, _ in self._waiting)
        for state in self._lanes.values():
            yield from state.sequences()

    def _fits(self, batch: BatchKey, new: Sequence[DecodingSequence]) -> bool:
        """Return whether the keys and values of all running sequences and the new ones fit at their full lengths.

        A single sequence always fits: its memory was checked at admission.
        """
        if self._kv_memory_bytes is None:
            return True
        running = {
            BatchKey(weights, lane): sequences
            for lane, state in self._lanes.items()
            for weights, sequences in state.running.items()
            if sequences
        }
        running[batch] = [*running.get(batch, []), *new]
        if sum(map(len, running.values())) == 1:
            return True
        needed = {
            key: self._kv_bytes(len(rows), max(s.max_length for s in rows)) for key, rows in running.items()
        }
        heavy = sum(size for key, size in needed.items() if key.lane is Lane.HEAVY)
        heavy_fits = batch.lane is Lane.LIGHT or heavy <= HEAVY_MEMORY_SHARE * self._kv_memory_bytes
        return heavy_fits and sum(needed.values()) <= self._kv_memory_bytes
