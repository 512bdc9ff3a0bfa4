"""Fakes of the ledger, the job store and the versioned model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from service.engine.versioned_model import VersionedModel
from service.errors import DigestMismatch, LeaseLost, error_document
from service.jobs.broker import Broker, Event
from service.jobs.job_store import ClaimedJob
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel, WeightRef
from service.patches.patch import BASE, PatchSet, weights_patch


class SettableLedger:
    """A ledger whose versions a test sets."""

    def __init__(self, head: int = 0) -> None:
        self.version = head
        self.attested: list[int] = []
        self.disputed: set[int] = set()  # versions at which other workers have other digests

    def head(self) -> int:
        return self.version

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return []

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)

    def attest(self, version: int, digest: str) -> None:
        self.attested.append(version)
        if version in self.disputed:
            raise DigestMismatch(f"the others have other weights at version {version}.")


class ShuffledVersionedModel(VersionedModel):
    """A versioned model whose version v has other weights: the rows of the edited layer permuted and scaled."""

    def __init__(self, model: LoadedModel, head: int = 2, layer: int = 1) -> None:
        self.settable_ledger = SettableLedger(head)
        super().__init__(model, self.settable_ledger, self.settable_ledger.attest)
        self.weight_ref = WeightRef(layer)

    def _compose_version(self, version: int) -> Stepper[PatchSet]:
        original = self._original[self.weight_ref]
        order = torch.randperm(len(original), generator=torch.Generator().manual_seed(version))
        yield Progress(Phase.COMPOSE, 1, 1)
        if version == 0:
            return BASE
        return weights_patch({self.weight_ref: original[order] * (1 + version)})


class InMemoryJobs:
    """A job store and a worker session in memory."""

    def __init__(self, jobs: dict[str, ClaimedJob] | None = None) -> None:
        self.jobs = jobs or {}
        self.reports: list[tuple[Any, ...]] = []
        self.cancelled: set[str] = set()
        self.single_process = True
        self.forgotten: list[str] = []
        self.edit_workers = 1

    def count_edit_workers(self) -> int:
        return self.edit_workers

    def add(self, job_id: str, kind: str, **request: Any) -> str:
        self.jobs[job_id] = ClaimedJob(job_id, kind, 1, request, "somebody", "", None, False)
        return job_id

    def claim(self, job_id: str) -> ClaimedJob | None:
        return self.jobs.pop(job_id, None)

    def cancel_requested(self, job: ClaimedJob) -> bool:
        return job.id in self.cancelled

    def report_progress(self, job: ClaimedJob, progress: Progress) -> None:
        self.reports.append(("progress", job.id, progress.done))

    def finish(self, job: ClaimedJob, status: str, result: dict[str, Any] | None = None) -> None:
        if status == "lost":
            raise LeaseLost("taken over.")
        self.reports.append((status, job.id, result))

    def fail(self, job: ClaimedJob, error: Any) -> None:
        self.reports.append(("failed", job.id, error_document(error)["code"]))

    def requeue(self, job: ClaimedJob) -> None:
        self.reports.append(("released", job.id))

    def forget_locally(self, job: ClaimedJob) -> None:
        self.forgotten.append(job.id)

    def heartbeat(self, version: int, digest: str | None = None) -> None:
        self.reported_version = (version, digest)

    def record_capacity(self, version: int, capacity: dict[int, float]) -> None:
        """Discard the capacity."""


def collect_events(broker: Broker, channel: str) -> list[Event]:
    """Return all events of a channel that has ended."""

    async def listen() -> list[Event]:
        return [event async for event in broker.events(channel)]

    return asyncio.run(asyncio.wait_for(listen(), 60))


def token_texts(events: list[Event], index: int = 0) -> Iterator[str]:
    """Return the concatenated token events of one prompt."""
    return (e.data["text"] for e in events if e.name == "token" and e.data["index"] == index)
