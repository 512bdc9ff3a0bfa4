"""Executes the scheduler's plans: one batch of sequences for each version, stepped with the version's weights in
place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.engine.decoding import DecodingBatch, DecodingSequence, TokenOutput
from service.engine.scheduler import Scheduler
from service.engine.versioned_model import VersionedModel, WeightOverrides
from service.kit import metrics

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _VersionBatch:
    weights: WeightOverrides
    batch: DecodingBatch


class BatchExecutor:
    """The running batches. Holds the weights of a version as long as it has sequences."""

    def __init__(self, replica: VersionedModel, scheduler: Scheduler) -> None:
        self._replica = replica
        self._scheduler = scheduler
        self._batches: dict[int, _VersionBatch] = {}

    def add(self, version: int, weights: WeightOverrides, sequences: Sequence[DecodingSequence]) -> None:
        """Admit sequences of a version."""
        if version not in self._batches:
            self._batches[version] = _VersionBatch(weights, DecodingBatch(self._replica.base, []))
        self._scheduler.add(version, sequences)

    def step(self) -> Iterator[list[TokenOutput]]:
        """Execute one plan. Yield the outputs of each batch as soon as it has been stepped."""
        plan = self._scheduler.schedule()
        if plan.prefill is not None:
            running = self._batches[plan.prefill.version]
            batch = DecodingBatch(self._replica.base, plan.prefill.sequences)
            outputs = self._step_batch(plan.prefill.version, running, batch, "prefill")
            running.batch.merge(batch)
            self._scheduler.update(plan.prefill.version, running.batch.sequences)
            yield outputs
        for version in plan.decode:
            running = self._batches[version]
            outputs = self._step_batch(version, running, running.batch, "decode")
            self._scheduler.update(version, running.batch.sequences)
            yield outputs
        for version in self._scheduler.drop_empty():
            self._batches.pop(version, None)

    def _step_batch(
        self, version: int, running: _VersionBatch, batch: DecodingBatch, phase: str
    ) -> list[TokenOutput]:
        """Step a batch. When that fails, its sequences are prefilled again one by one; one that fails alone ends."""
        try:
            with self._replica.use_weights(running.weights):
                return _step_with_metrics(phase, batch)
        except Exception:
            log.exception("decode failed", extra={"version": version, "rows": len(batch)})
        sequences = [s for single in batch.split() for s in single.sequences]
        if len(sequences) > 1:
            self._scheduler.retry(version, sequences)
            return []
        return [TokenOutput(s, s.finish("error")) for s in sequences]


def _step_with_metrics(phase: str, batch: DecodingBatch) -> list[TokenOutput]:
    with metrics.ENGINE_STEP_SECONDS.labels(phase).time():
        outputs = batch.step()
    metrics.TOKENS.inc(len(outputs))
    if outputs and phase == "decode":
        metrics.BATCH_SIZE.observe(len(outputs))
    return outputs
