"""Which sequences are prefilled and decoded in the next step. Pure bookkeeping: no tensors and no model.

Each version has a queue of its own, so that no batch mixes two versions. A step prefills at most one group of new
sequences and gives every version with running sequences one decode step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from service.engine.decoding import DecodingSequence

MAX_PREFILL_TOKENS = 1024  # prompt tokens of one prefill step, padding included
MAX_PREFILL_SEQUENCES = 16  # sequences of one prefill step

#: the bytes of keys and values of a batch: (sequences, positions) -> bytes
KvBytes = Callable[[int, int], int]


@dataclass(eq=False)
class VersionQueue:
    """The sequences of one version."""

    version: int
    running: list[DecodingSequence] = field(default_factory=list)  #: prefilled
    waiting: deque[DecodingSequence] = field(default_factory=deque)
    to_retry: deque[DecodingSequence] = field(
        default_factory=deque
    )  #: prefilled again one by one after an error

    def __bool__(self) -> bool:
        return bool(self.running or self.waiting or self.to_retry)

    def next_prefill_group(
        self, max_sequences: int, fits: Callable[[Sequence[DecodingSequence]], bool]
    ) -> list[DecodingSequence]:
        """Remove and return the next sequences to prefill together: at most `max_sequences`, and as many as fit."""
        if self.to_retry:
            return [self.to_retry.popleft()]
        group: list[DecodingSequence] = []
        width = 0
        while self.waiting and len(group) < min(MAX_PREFILL_SEQUENCES, max_sequences):
            width = max(width, len(self.waiting[0].token_ids))
            if group and (len(group) + 1) * width > MAX_PREFILL_TOKENS:
                break
            if not fits([*group, self.waiting[0]]):
                break
            group.append(self.waiting.popleft())
        return group


@dataclass(frozen=True)
class PrefillGroup:
    """Sequences of one version that are prefilled together."""

    version: int
    sequences: list[DecodingSequence]


@dataclass(frozen=True)
class StepPlan:
    """What the next step executes."""

    prefill: PrefillGroup | None
    decode: list[int]  #: versions whose running sequences decode one token


class Scheduler:
    """Bounds the running sequences by `max_batch_size` and by the memory of their keys and values."""

    def __init__(self, max_batch_size: int, kv_bytes: KvBytes, kv_memory_bytes: int | None = None) -> None:
        self._queues: dict[int, VersionQueue] = {}
        self._max_batch_size = max_batch_size
        self._kv_bytes = kv_bytes
        self._kv_memory_bytes = kv_memory_bytes  # None: unknown, not bounded

    def __bool__(self) -> bool:
        return bool(self._queues)

    @property
    def free_slots(self) -> int:
        """Sequences that may be admitted; 0 while admitted sequences wait for their prefill."""
        if any(queue.waiting or queue.to_retry for queue in self._queues.values()):
            return 0
        return self._unused_slots()

    def add(self, version: int, sequences: Sequence[DecodingSequence]) -> None:
        """Queue sequences of a version for their prefill, the shortest prompts first."""
        queue = self._queues.setdefault(version, VersionQueue(version))
        queue.waiting.extend(sorted(sequences, key=lambda s: len(s.prompt_ids)))

    def schedule(self) -> StepPlan:
        """Return the plan of the next step. The sequences of its prefill group leave the queue until `update`."""
        decode = [version for version, queue in self._queues.items() if queue.running]
        for queue in self._queues.values():
            if group := queue.next_prefill_group(self._unused_slots(), partial(self._fits, queue)):
                return StepPlan(PrefillGroup(queue.version, group), decode)
        return StepPlan(None, decode)

    def update(self, version: int, running: Sequence[DecodingSequence]) -> None:
        """Record the sequences of a version that run after a step."""
        self._queues[version].running = list(running)

    def retry(self, version: int, sequences: Sequence[DecodingSequence]) -> None:
        """Queue sequences whose step failed, to be prefilled again one by one."""
        self._queues[version].to_retry.extend(sequences)

    def drop_empty(self) -> list[int]:
        """Remove the versions without sequences and return them."""
        empty = [version for version, queue in self._queues.items() if not queue]
        for version in empty:
            del self._queues[version]
        return empty

    def _unused_slots(self) -> int:
        return max(0, self._max_batch_size - sum(len(queue.running) for queue in self._queues.values()))

    def _fits(self, queue: VersionQueue, new: Sequence[DecodingSequence]) -> bool:
        """Return whether the keys and values of all running sequences and the new ones fit at their full lengths.

        A single sequence always fits: its memory was checked at admission.
        """
        if self._kv_memory_bytes is None:
            return True
        batches = [[*other.running, *(new if other is queue else ())] for other in self._queues.values()]
        if sum(map(len, batches)) == 1:
            return True
        needed = sum(
            self._kv_bytes(len(batch), max(s.max_length for s in batch)) for batch in batches if batch
        )
        return self._kv_memory_bytes >= needed
