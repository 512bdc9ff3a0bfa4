"""Requests and responses of the clients of the chaos bench, recorded for its checks."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Resource = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One HTTP request. `outcome` is the status, or how the connection failed."""

    client: str
    action: str
    outcome: str
    began: float
    ended: float


@dataclass(frozen=True)
class ReportedStatus:
    """Status and versions of a job in a response."""

    id: str
    status: str
    version: int | None = None
    reverted_version: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One event of a stream."""

    index: int
    text: str
    version: int


@dataclass(frozen=True)
class GenerationRecord:
    """The texts of a generation or of one side of a comparison. `request` has the fields that determine the text.

    `tokens` are those since the last reset; None when the response was not a stream. An incomplete stream has no
    `texts`.
    """

    client: str
    request: Resource
    version: int
    texts: tuple[str, ...]
    pinned_version: int | None = None
    min_version: int | None = None
    tokens: tuple[TokenEvent, ...] | None = None
    resets: int = 0

    @property
    def complete(self) -> bool:
        return bool(self.texts)

    def prompts(self) -> list[str]:
        return self.request.get("prompts") or [self.request["prompt"]]


@dataclass
class ClientLog:
    """What the clients observed. Thread-safe."""

    attempts: list[Attempt] = field(default_factory=list)
    reported_statuses: list[ReportedStatus] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)
    ids_by_key: dict[str, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )  #: idempotency key -> job ids returned
    abandoned: list[str] = field(default_factory=list)  #: actions that a client abandoned
    anomalies: list[str] = field(default_factory=list)  #: unexpected observations
    newest_version: int = 0  #: newest version in a response
    _active_edits: dict[str, None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def record_attempt(self, client: str, action: str, outcome: str, began: float) -> None:
        with self._lock:
            self.attempts.append(Attempt(client, action, outcome, began, time.monotonic()))

    def record_accepted(self, key: str, resource: Resource) -> None:
        with self._lock:
            self.ids_by_key[key].add(resource["id"])
        self.record_status(resource)

    def record_status(self, resource: Resource) -> None:
        """Record the status of an edit or trace."""
        report = ReportedStatus(
            resource["id"], resource["status"], resource.get("version"), resource.get("reverted_version")
        )
        with self._lock:
            self.reported_statuses.append(report)
            if not report.id.startswith("edit"):
                return
            self.newest_version = max(self.newest_version, report.version or 0, report.reverted_version or 0)
            if report.version is not None and report.reverted_version is None:
                self._active_edits[report.id] = None
            else:
                self._active_edits.pop(report.id, None)

    def record_generations(self, records: Iterable[GenerationRecord]) -> None:
        with self._lock:
            self.generations.extend(records)

    def record_abandoned(self, description: str) -> None:
        with self._lock:
            self.abandoned.append(description)

    def record_anomaly(self, message: str) -> None:
        with self._lock:
            self.anomalies.append(message)

    def pick_active_edit(self, fraction: float) -> str | None:
        """Return one of the edits last reported as applied, selected by a fraction of the list; None if there
        is none."""
        with self._lock:
            edits = list(self._active_edits)
        return edits[int(fraction * len(edits))] if edits else None
