"""What the clients of the chaos bench asked and were told: all that its checks look at, besides the service itself."""

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
    """One request on the wire. `outcome` is the HTTP status, or what became of the connection."""

    client: str
    action: str
    outcome: str
    began: float
    ended: float


@dataclass(frozen=True)
class ReportedStatus:
    """What a client was told of an edit or a trace."""

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
    """What was said to a generation, or on one side of a comparison. `asked` is all that the text depends on.

    `tokens` are those heard since the last restart, None when nothing was streamed. An answer that broke off has no `texts`.
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
    """Kept by many threads at once."""

    attempts: list[Attempt] = field(default_factory=list)
    reported_statuses: list[ReportedStatus] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)
    ids_by_key: dict[str, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )  #: key -> ids that it was given
    abandoned: list[str] = field(default_factory=list)  #: wishes that a client gave up
    anomalies: list[str] = field(default_factory=list)  #: what no client should meet
    newest_version: int = 0  #: version that an edit was told to be at
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
        """A client read a resource."""
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
        """One of the edits that were told to be applied and not to be reverted."""
        with self._lock:
            edits = list(self._active_edits)
        return edits[int(fraction * len(edits))] if edits else None
