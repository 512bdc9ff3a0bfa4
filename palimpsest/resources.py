"""What the service answers, as plain data: small frozen records that know no connection.

Each keeps the whole answer as `raw`, so that what a newer service says is there before this client has a name for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, ClassVar, Self

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Anything that the service answers."""

    raw: Json = field(default_factory=dict, repr=False, compare=False)  #: the answer as it came

    @classmethod
    def of(cls, answer: Json) -> Self:
        """The record of an answer: members without a name here stay in `raw`, null is as good as left out."""
        known: dict[str, Any] = {"raw": answer}
        for one in fields(cls):
            value = answer.get(one.name)
            if value is not None and one.name != "raw":
                known[one.name] = one.metadata["read"](value) if "read" in one.metadata else value
        return cls(**known)


def _as(read: Callable[[Any], Any]) -> Mapping[str, Any]:
    """How a member is read."""
    return {"read": read}


def _each(kind: type[Resource]) -> Mapping[str, Any]:
    """A list of records."""
    return _as(lambda answers: tuple(map(kind.of, answers)))


LIST = _as(tuple)
TIME = _as(datetime.fromisoformat)


@dataclass(frozen=True, kw_only=True)
class Progress(Resource):
    """How far a job is; `total` is 0 where nobody knows."""

    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Trouble(Resource):
    """Why a job failed."""

    title: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Job(Resource):
    """What all jobs share. A listed job may be of any kind; `links` lead to the resource itself."""

    path: ClassVar[str] = "/jobs"
    open: ClassVar[tuple[str, ...]] = ("queued", "running")

    id: str
    status: str
    kind: str = ""
    progress: Progress | None = field(default=None, metadata=_as(Progress.of))
    error: Trouble | None = field(default=None, metadata=_as(Trouble.of))
    actor: str = ""
    attempts: int = 0
    created: datetime | None = field(default=None, metadata=TIME)
    started: datetime | None = field(default=None, metadata=TIME)
    ended: datetime | None = field(default=None, metadata=TIME)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether it has ended, whatever became of it."""
        return self.status not in self.open

    @property
    def reason(self) -> str:
        """Why it did not do what it was asked; empty where it did, or has not ended."""
        return self.error.detail if self.error else ""


@dataclass(frozen=True, kw_only=True)
class Edit(Job):
    """An edit, from its asking to its end. `result` has what was measured before and after."""

    path: ClassVar[str] = "/edits"

    subject: str
    prompt: str
    target_new: str | None = None
    target_true: str | None = None
    objective: str = "write"
    on_conflict: str = "report"
    method: str = ""
    hparams: Json | None = None
    dry_run: bool = False
    version: int | None = None  #: at which it was applied
    reverted_version: int | None = None  #: at which it was taken back
    result: Json | None = None
    related: tuple[str, ...] = field(default=(), metadata=LIST)  #: active edits of the same subject
    superseded_by: str | None = None

    @property
    def landed(self) -> bool:
        """Whether it is, or was, in the ledger."""
        return self.version is not None

    @property
    def reason(self) -> str:
        """Why it did not land: the guard's words, or the error's."""
        return str((self.result or {}).get("reason") or super().reason)

    @property
    def before(self) -> float | None:
        """The probability that the prompt had of the new object before; of the true one, where that is the edit's object."""
        return self._probability("before")

    @property
    def after(self) -> float | None:
        """The same after the edit."""
        return self._probability("after")

    def _probability(self, when: str) -> float | None:
        rewrite = (self.result or {}).get("rewrite") or {}
        value = (rewrite.get(when) or {}).get("new")
        return None if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class Trace(Job):
    """A causal trace, from its asking to its end. `result` has tokens, scores and the strongest state of each kind."""

    path: ClassVar[str] = "/trace"

    request: Json = field(default_factory=dict)
    version: int | None = None  #: that was traced
    result: Json | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Job):
    """An evaluation, from its asking to its end; a listed one is without its `result`."""

    path: ClassVar[str] = "/evaluations"

    request: Json = field(default_factory=dict)
    result: Json | None = None


@dataclass(frozen=True, kw_only=True)
class Usage(Resource):
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation(Resource):
    """What the model wrote, and the version that wrote every token of it."""

    text: str
    version: int
    tokens: tuple[int, ...] = field(default=(), metadata=LIST)
    finish_reason: str = ""
    usage: Usage | None = field(default=None, metadata=_as(Usage.of))  #: of the whole request
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Token(Resource):
    """A piece of a streamed answer. The last one is empty and has the `finish_reason`.

    `restart` is true where a worker died and another one begins anew: what came before is void.
    """

    text: str
    version: int
    restart: bool = False
    finish_reason: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Side(Resource):
    """What one version wrote."""

    version: int
    text: str
    tokens: tuple[int, ...] = field(default=(), metadata=LIST)
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NextToken(Resource):
    """A next token, and its probability on each side."""

    token: str
    id: int
    p: tuple[float, ...] = field(default=(), metadata=LIST)


@dataclass(frozen=True, kw_only=True)
class Comparison(Resource):
    """One prompt on two versions; `next_tokens` that differ most come first."""

    prompt: str
    sides: tuple[Side, ...] = field(default=(), metadata=_each(Side))
    next_tokens: tuple[NextToken, ...] = field(default=(), metadata=_each(NextToken))
    total_variation: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Entry(Resource):
    """An entry of the ledger: from this version on the edit is active, or no longer. `body` is what is under the hash."""

    version: int
    kind: str
    edit_id: str
    actor: str
    hash: str
    previous: str = ""
    at: datetime | None = field(default=None, metadata=TIME)
    body: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verification(Resource):
    """Whether hashes, factors and replicas agree; `findings` say in words what does not."""

    ok: bool
    entries: int = 0
    head: int = 0
    findings: tuple[Any, ...] = field(default=(), metadata=LIST)
    replicas: tuple[Json, ...] = field(default=(), metadata=LIST)

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, kw_only=True)
class Worker(Resource):
    """A worker, and where it stands."""

    id: str
    state: str
    version: int
    lag: int = 0
    digest: str | None = None
    reason: str | None = None
    roles: tuple[str, ...] = field(default=(), metadata=LIST)
    age: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Model(Resource):
    """The resident model; its architecture, recipe and sizes are in `raw`."""

    name: str
    fingerprint: str
    head: int
    active_edits: int = 0
    architecture: str = ""
    layers: int = 0
    jobs: Json = field(default_factory=dict)
    room: Json | None = None
    workers: tuple[Worker, ...] = field(default=(), metadata=_each(Worker))
