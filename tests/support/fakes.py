"""Small stand-ins for what a part under test talks to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from service.engine.versioned_model import Replica, Weights
from service.errors import Disagrees, LeaseLost
from service.jobs.broker import Broker, Event
from service.jobs.job_store import RunningJob
from service.kit.steps import Progress
from service.models.loading import LoadedModel, Site


class NoLedger:
    """A ledger whose versions a test sets by hand."""

    def __init__(self, head: int = 0) -> None:
        self.version = head
        self.attested: list[int] = []
        self.disputed: set[int] = set()  # versions at which the others have other weights

    def head(self) -> int:
        return self.version

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return []

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {}

    def attest(self, version: int, digest: str) -> None:
        self.attested.append(version)
        if version in self.disputed:
            raise Disagrees(f"the others have other weights at version {version}.")


class ShuffledReplica(Replica):
    """A replica whose version v has really different weights: the edited layer's rows in another order, and louder."""

    def __init__(self, model: LoadedModel, head: int = 2, layer: int = 1) -> None:
        self.book = NoLedger(head)
        super().__init__(model, self.book)
        self.site = Site(layer)

    def _built(self, version: int) -> Weights:
        if version == 0:
            return {}
        if version not in self._weights:
            original = self._original[self.site]
            order = torch.randperm(len(original), generator=torch.Generator().manual_seed(version))
            self._weights[version] = {self.site: original[order] * (1 + version)}
        return self._weights[version]


class MemoryDesk:
    """A desk whose rows are in memory."""

    def __init__(self, jobs: dict[str, RunningJob] | None = None) -> None:
        self.jobs = jobs or {}
        self.told: list[tuple[Any, ...]] = []
        self.cancelled: set[str] = set()
        self.sole = True
        self.abandoned: list[str] = []
        self.workers = 1

    def editors(self) -> int:
        return self.workers

    def add(self, job_id: str, kind: str, **request: Any) -> str:
        self.jobs[job_id] = RunningJob(job_id, kind, 1, request, "somebody", "", None, False)
        return job_id

    def start(self, job_id: str) -> RunningJob | None:
        return self.jobs.pop(job_id, None)

    def cancel_requested(self, job: RunningJob) -> bool:
        return job.id in self.cancelled

    def progress(self, job: RunningJob, progress: Progress) -> None:
        self.told.append(("progress", job.id, progress.done))

    def finish(self, job: RunningJob, status: str, result: dict[str, Any] | None = None) -> None:
        if status == "lost":
            raise LeaseLost("taken over.")
        self.told.append((status, job.id, result))

    def fail(self, job: RunningJob, error: Any) -> None:
        self.told.append(("failed", job.id, getattr(error, "detail", error)))

    def release(self, job: RunningJob) -> None:
        self.told.append(("released", job.id))

    def abandon(self, job: RunningJob) -> None:
        self.abandoned.append(job.id)

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        self.told_position = (version, digest)

    def tell_room(self, version: int, room: dict[int, float]) -> None:
        """Nobody reads it."""


def heard(broker: Broker, channel: str) -> list[Event]:
    """All events of a channel that has ended."""

    async def listen() -> list[Event]:
        return [event async for event in broker.events(channel)]

    return asyncio.run(asyncio.wait_for(listen(), 10))


def pieces(events: list[Event], index: int = 0) -> Iterator[str]:
    """The text of the token events of one prompt."""
    return (e.data["text"] for e in events if e.name == "token" and e.data["index"] == index)
