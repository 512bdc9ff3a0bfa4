"""Which rows decode together: one lane for each version, so that no batch ever mixes two.

A turn reads at most one group of new prompts, which then joins its lane, and gives every lane one decode step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from service.engine.decoding import DecodingBatch, DecodingSequence, TokenOutput
from service.engine.versioned_model import VersionedModel, WeightOverrides
from service.kit import metrics
from service.models.memory_estimates import kv_cache_bytes

log = logging.getLogger(__name__)

MAX_PREFILL_TOKENS = 1024  # tokens of new prompts, padding included, that one step may read
MAX_PREFILL_SEQUENCES = 16  # and prompts


@dataclass(eq=False)
class VersionQueue:
    """The rows of one version: those that decode, and those that are still to be read."""

    version: int
    weights: WeightOverrides
    batch: DecodingBatch
    waiting: deque[DecodingSequence] = field(default_factory=deque)
    to_retry: deque[DecodingSequence] = field(
        default_factory=deque
    )  #: their pass failed; to be read anew, one by one

    def __bool__(self) -> bool:
        return bool(len(self.batch) or self.waiting or self.to_retry)

    def next_prefill_batch(
        self, max_sequences: int, fits: Callable[[Sequence[DecodingSequence]], bool]
    ) -> list[DecodingSequence]:
        """The next rows to be read together, at most `room`, and as many as fit."""
        if self.to_retry:
            return [self.to_retry.popleft()]
        batch: list[DecodingSequence] = []
        width = 0
        while self.waiting and len(batch) < min(MAX_PREFILL_SEQUENCES, max_sequences):
            width = max(width, len(self.waiting[0].token_ids))
            if batch and (len(batch) + 1) * width > MAX_PREFILL_TOKENS:
                break
            if not fits([*batch, self.waiting[0]]):
                break
            batch.append(self.waiting.popleft())
        return batch


class Scheduler:
    """All rows that are being answered, at most `room` of them in batches, and as many as their caches have memory for."""

    def __init__(
        self, replica: VersionedModel, max_batch_size: int, kv_memory_bytes: int | None = None
    ) -> None:
        self._replica = replica
        self._queues: dict[int, VersionQueue] = {}
        self._max_batch_size = max_batch_size
        self._kv_memory_bytes = kv_memory_bytes  # bytes for keys and values; None: nobody knows a limit

    @property
    def free_slots(self) -> int:
        """Rows that could be taken in; none while some are waiting to be read."""
        if any(lane.waiting or lane.to_retry for lane in self._queues.values()):
            return 0
        return self._unused_slots()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, version: int, weights: WeightOverrides, sequences: Sequence[DecodingSequence]) -> None:
        """Rows that will join the lane of their version."""
        if version not in self._queues:
            self._queues[version] = VersionQueue(version, weights, DecodingBatch(self._replica.base, []))
        self._queues[version].waiting.extend(sorted(sequences, key=lambda r: len(r.prompt_ids)))

    def step(self) -> Iterator[list[TokenOutput]]:
        """One decode step for every lane, after one group of new rows was read. Each gives what it said."""
        decoding = [queue for queue in self._queues.values() if len(queue.batch)]
        yield from self._prefill()
        for queue in decoding:
            yield self._step_batch(queue, queue.batch)
        self._queues = {v: queue for v, queue in self._queues.items() if queue}

    def _unused_slots(self) -> int:
        return max(0, self._max_batch_size - sum(len(lane.batch) for lane in self._queues.values()))

    def _fits_memory(self, queue: VersionQueue, new: Sequence[DecodingSequence]) -> bool:
        """Whether there is memory for the caches of all rows, these included, when all have said all they may. One row by
        itself always fits: what it takes was looked at when it was asked for."""
        if self._kv_memory_bytes is None:
            return True
        sequences = {
            v: [*other.batch.sequences, *(new if other is queue else ())] for v, other in self._queues.items()
        }
        if sum(map(len, sequences.values())) == 1:
            return True
        model = self._replica.base
        return self._kv_memory_bytes >= sum(
            kv_cache_bytes(model, len(r), max(x.max_length for x in r)) for r in sequences.values() if r
        )

    def _prefill(self) -> Iterator[list[TokenOutput]]:
        """Read one group of waiting prompts when there is room, and let it join its lane."""
        for queue in self._queues.values():
            if sequences := queue.next_prefill_batch(self._unused_slots(), partial(self._fits_memory, queue)):
                batch = DecodingBatch(self._replica.base, sequences)
                outputs = self._step_batch(queue, batch)
                queue.batch.merge(batch)
                yield outputs
                return

    def _step_batch(self, queue: VersionQueue, batch: DecodingBatch) -> list[TokenOutput]:
        """A step at the lane's version. When it fails, its rows are read anew one by one; one that fails alone ends."""
        try:
            with self._replica.use_weights(queue.weights):
                return _step_with_metrics("token" if batch is queue.batch else "prompt", batch)
        except Exception:
            log.exception("decode failed", extra={"version": queue.version, "rows": len(batch)})
        sequences = [r for single in batch.split() for r in single.sequences]
        if len(sequences) > 1:
            queue.to_retry.extend(sequences)
            return []
        return [TokenOutput(r, r.finish("error")) for r in sequences]


def _step_with_metrics(phase: str, batch: DecodingBatch) -> list[TokenOutput]:
    """One step of a batch, as the metrics hear of it."""
    with metrics.ENGINE_STEP_SECONDS.labels(phase).time():
        outputs = batch.step()
    metrics.TOKENS.inc(len(outputs))
    if outputs and phase == "token":
        metrics.BATCH_SIZE.observe(len(outputs))
    return outputs
