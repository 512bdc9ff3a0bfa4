"""Which rows decode together: one lane for each version, so that no batch ever mixes two.

A turn reads at most one group of new prompts, which then joins its lane, and gives every lane one decode step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from service.engine.decoding import Batch, Row, Said
from service.engine.versioned_model import Replica, Weights
from service.kit import metrics
from service.models.memory_estimates import cache_bytes

log = logging.getLogger(__name__)

READ = 1024  # tokens of new prompts, padding included, that one step may read
GROUP = 16  # and prompts


@dataclass(eq=False)
class Lane:
    """The rows of one version: those that decode, and those that are still to be read."""

    version: int
    weights: Weights
    batch: Batch
    waiting: deque[Row] = field(default_factory=deque)
    failed: deque[Row] = field(default_factory=deque)  #: their pass failed; to be read anew, one by one

    def __bool__(self) -> bool:
        return bool(len(self.batch) or self.waiting or self.failed)

    def group(self, room: int, fits: Callable[[Sequence[Row]], bool]) -> list[Row]:
        """The next rows to be read together, at most `room`, and as many as fit."""
        if self.failed:
            return [self.failed.popleft()]
        group: list[Row] = []
        width = 0
        while self.waiting and len(group) < min(GROUP, room):
            width = max(width, len(self.waiting[0].ids))
            if group and (len(group) + 1) * width > READ:
                break
            if not fits([*group, self.waiting[0]]):
                break
            group.append(self.waiting.popleft())
        return group


class Lanes:
    """All rows that are being answered, at most `room` of them in batches, and as many as their caches have memory for."""

    def __init__(self, replica: Replica, room: int, memory: int | None = None) -> None:
        self._replica = replica
        self._lanes: dict[int, Lane] = {}
        self._room = room
        self._memory = memory  # bytes for keys and values; None: nobody knows a limit

    @property
    def free(self) -> int:
        """Rows that could be taken in; none while some are waiting to be read."""
        if any(lane.waiting or lane.failed for lane in self._lanes.values()):
            return 0
        return self._left()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def add(self, version: int, weights: Weights, rows: Sequence[Row]) -> None:
        """Rows that will join the lane of their version."""
        if version not in self._lanes:
            self._lanes[version] = Lane(version, weights, Batch(self._replica.base, []))
        self._lanes[version].waiting.extend(sorted(rows, key=lambda r: len(r.prompt)))

    def turn(self) -> Iterator[list[Said]]:
        """One decode step for every lane, after one group of new rows was read. Each gives what it said."""
        decoding = [lane for lane in self._lanes.values() if len(lane.batch)]
        yield from self._read()
        for lane in decoding:
            yield self._step(lane, lane.batch)
        self._lanes = {v: lane for v, lane in self._lanes.items() if lane}

    def _left(self) -> int:
        return max(0, self._room - sum(len(lane.batch) for lane in self._lanes.values()))

    def _fits(self, lane: Lane, new: Sequence[Row]) -> bool:
        """Whether there is memory for the caches of all rows, these included, when all have said all they may. One row by
        itself always fits: what it takes was looked at when it was asked for."""
        if self._memory is None:
            return True
        rows = {v: [*other.batch.rows, *(new if other is lane else ())] for v, other in self._lanes.items()}
        if sum(map(len, rows.values())) == 1:
            return True
        model = self._replica.base
        return self._memory >= sum(
            cache_bytes(model, len(r), max(x.most for x in r)) for r in rows.values() if r
        )

    def _read(self) -> Iterator[list[Said]]:
        """Read one group of waiting prompts when there is room, and let it join its lane."""
        for lane in self._lanes.values():
            if rows := lane.group(self._left(), partial(self._fits, lane)):
                batch = Batch(self._replica.base, rows)
                said = self._step(lane, batch)
                lane.batch.join(batch)
                yield said
                return

    def _step(self, lane: Lane, batch: Batch) -> list[Said]:
        """A step at the lane's version. When it fails, its rows are read anew one by one; one that fails alone ends."""
        try:
            with self._replica.stand(lane.weights):
                return _counted("token" if batch is lane.batch else "prompt", batch)
        except Exception:
            log.exception("decode failed", extra={"version": lane.version, "rows": len(batch)})
        alone = [r for single in batch.split() for r in single.rows]
        if len(alone) > 1:
            lane.failed.extend(alone)
            return []
        return [Said(r, r.finish("error")) for r in alone]


def _counted(reads: str, batch: Batch) -> list[Said]:
    """One step of a batch, as the metrics hear of it."""
    with metrics.STEP_SECONDS.labels(reads).time():
        said = batch.step()
    metrics.TOKENS.inc(len(said))
    if said and reads == "token":
        metrics.BATCH_ROWS.observe(len(said))
    return said
