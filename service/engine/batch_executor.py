"""Executes the scheduler's plans: steps batches with the patches of their sequences in place.

The sequences of a batch have the same edited weights and codebooks. Their gated rows may be those of different
versions: each sequence is changed by the rows of its own version alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from service.engine.decoding import DecodingBatch, DecodingSequence, TokenOutput
from service.engine.scheduler import BatchKey, Scheduler
from service.engine.versioned_model import VersionedModel
from service.kit import metrics
from service.patches.patch import PatchSet

log = logging.getLogger(__name__)


class BatchExecutor:
    """The running batches. Holds the patches of a sequence as long as it waits or runs."""

    def __init__(self, replica: VersionedModel, scheduler: Scheduler) -> None:
        self._replica = replica
        self._scheduler = scheduler
        self._patches: dict[DecodingSequence, PatchSet] = {}
        self._batches: dict[BatchKey, DecodingBatch] = {}

    def add(
        self,
        patch: PatchSet,
        sequences: Sequence[DecodingSequence],
        caller: str,
        cost: float,
    ) -> None:
        """Admit the sequences of a call (see `Scheduler.add`), with the patches of its version."""
        self._patches |= dict.fromkeys(sequences, patch)
        self._scheduler.add(patch.shared, sequences, caller, cost)

    def step(self) -> Iterator[list[TokenOutput]]:
        """Execute one plan. Yield the outputs of each batch as soon as it has been stepped."""
        plan = self._scheduler.schedule()
        if plan.prefill is not None:
            key = plan.prefill.batch
            batch = DecodingBatch(self._replica.base, plan.prefill.sequences)
            outputs = self._step_batch(key, batch, "prefill")
            running = self._batches.setdefault(key, DecodingBatch(self._replica.base, []))
            running.merge(batch)
            self._scheduler.update(key, running.sequences)
            yield outputs
        for key in plan.decode:
            outputs = self._step_batch(key, self._batches[key], "decode")
            self._scheduler.update(key, self._batches[key].sequences)
            yield outputs
        for key in self._batches.keys() - self._scheduler.batches():
            del self._batches[key]
        for sequence in self._patches.keys() - set(self._scheduler.sequences()):
            del self._patches[sequence]

    def _step_batch(self, key: BatchKey, batch: DecodingBatch, phase: str) -> list[TokenOutput]:
        """Step a batch. When that fails, its sequences are prefilled again one by one; one that fails alone ends."""
        started = time.monotonic()
        try:
            batch.drop_finished()  # so that the patches are those of the sequences that are stepped
            if not batch.sequences:
                return []
            with self._replica.use_patches([self._patches[s] for s in batch.sequences]):
                return _step_with_metrics(phase, batch)
        except Exception:
            log.exception("decode failed", extra={"rows": len(batch)})
        finally:
            self._scheduler.record_time(key.lane, time.monotonic() - started)
        sequences = [s for single in batch.split() for s in single.sequences]
        if len(sequences) > 1:
            self._scheduler.retry(key, sequences)
            return []
        return [TokenOutput(s, s.finish("error")) for s in sequences]


def _step_with_metrics(phase: str, batch: DecodingBatch) -> list[TokenOutput]:
    with metrics.ENGINE_STEP_SECONDS.labels(phase).time():
        outputs = batch.step()
    metrics.TOKENS.inc(len(outputs))
    if outputs and phase == "decode":
        metrics.BATCH_SIZE.observe(len(outputs))
    return outputs
