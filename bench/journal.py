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
class Told:
    """What a client was told of an edit or a trace."""

    id: str
    status: str
    version: int | None = None
    reverted: int | None = None


@dataclass(frozen=True)
class Token:
    """One event of a stream."""

    index: int
    text: str
    version: int


@dataclass(frozen=True)
class Answer:
    """What was said to a generation, or on one side of a comparison. `asked` is all that the text depends on.

    `tokens` are those heard since the last restart, None when nothing was streamed. An answer that broke off has no `texts`.
    """

    client: str
    asked: Resource
    version: int
    texts: tuple[str, ...]
    pinned: int | None = None
    least: int | None = None
    tokens: tuple[Token, ...] | None = None
    restarts: int = 0

    @property
    def complete(self) -> bool:
        return bool(self.texts)

    def prompts(self) -> list[str]:
        return self.asked.get("prompts") or [self.asked["prompt"]]


@dataclass
class Journal:
    """Kept by many threads at once."""

    attempts: list[Attempt] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    made: dict[str, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )  #: key -> ids that it was given
    unanswered: list[str] = field(default_factory=list)  #: wishes that a client gave up
    troubles: list[str] = field(default_factory=list)  #: what no client should meet
    newest: int = 0  #: version that an edit was told to be at
    _standing: dict[str, None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def attempt(self, client: str, action: str, outcome: str, began: float) -> None:
        with self._lock:
            self.attempts.append(Attempt(client, action, outcome, began, time.monotonic()))

    def accepted(self, key: str, resource: Resource) -> None:
        with self._lock:
            self.made[key].add(resource["id"])
        self.heard(resource)

    def heard(self, resource: Resource) -> None:
        """A client read a resource."""
        told = Told(
            resource["id"], resource["status"], resource.get("version"), resource.get("reverted_version")
        )
        with self._lock:
            self.told.append(told)
            if not told.id.startswith("edit"):
                return
            self.newest = max(self.newest, told.version or 0, told.reverted or 0)
            if told.version is not None and told.reverted is None:
                self._standing[told.id] = None
            else:
                self._standing.pop(told.id, None)

    def answered(self, answers: Iterable[Answer]) -> None:
        with self._lock:
            self.answers.extend(answers)

    def gave_up(self, wish: str) -> None:
        with self._lock:
            self.unanswered.append(wish)

    def trouble(self, words: str) -> None:
        with self._lock:
            self.troubles.append(words)

    def standing(self, share: float) -> str | None:
        """One of the edits that were told to be applied and not to be reverted."""
        with self._lock:
            edits = list(self._standing)
        return edits[int(share * len(edits))] if edits else None
