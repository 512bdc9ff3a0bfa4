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
    def from_json(cls, data: Json) -> Self:
        """The record of an answer: members without a name here stay in `raw`, null is as good as left out."""
        values: dict[str, Any] = {"raw": data}
        for member in fields(cls):
            value = data.get(member.name)
            if value is not None and member.name != "raw":
                values[member.name] = member.metadata["read"](value) if "read" in member.metadata else value
        return cls(**values)


def _parsed_by(parser: Callable[[Any], Any]) -> Mapping[str, Any]:
    """How a member is read."""
    return {"read": parser}


def _list_of(kind: type[Resource]) -> Mapping[str, Any]:
    """A list of records."""
    return _parsed_by(lambda answers: tuple(map(kind.from_json, answers)))


AS_TUPLE = _parsed_by(tuple)
AS_TIMESTAMP = _parsed_by(datetime.fromisoformat)


@dataclass(frozen=True, kw_only=True)
class Progress(Resource):
    """How far a job is; `total` is 0 where nobody knows."""

    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class JobFailure(Resource):
    """Why a job failed."""

    title: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Job(Resource):
    """What all jobs share. A listed job may be of any kind; `links` lead to the resource itself."""

    path: ClassVar[str] = "/jobs"
    open_statuses: ClassVar[tuple[str, ...]] = ("queued", "running")

    id: str
    status: str
    kind: str = ""
    progress: Progress | None = field(default=None, metadata=_parsed_by(Progress.from_json))
    error: JobFailure | None = field(default=None, metadata=_parsed_by(JobFailure.from_json))
    actor: str = ""
    attempts: int = 0
    created: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    started: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    ended: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it has ended, whatever became of it."""
        return self.status not in self.open_statuses

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
    related: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)  #: active edits of the same subject
    superseded_by: str | None = None

    @property
    def applied(self) -> bool:
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
    tokens: tuple[int, ...] = field(default=(), metadata=AS_TUPLE)
    finish_reason: str = ""
    usage: Usage | None = field(default=None, metadata=_parsed_by(Usage.from_json))  #: of the whole request
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
    reset: bool = False
    finish_reason: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Side(Resource):
    """What one version wrote."""

    version: int
    text: str
    tokens: tuple[int, ...] = field(default=(), metadata=AS_TUPLE)
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NextToken(Resource):
    """A next token, and its probability on each side."""

    token: str
    id: int
    p: tuple[float, ...] = field(default=(), metadata=AS_TUPLE)


@dataclass(frozen=True, kw_only=True)
class Comparison(Resource):
    """One prompt on two versions; `next_tokens` that differ most come first."""

    prompt: str
    sides: tuple[Side, ...] = field(default=(), metadata=_list_of(Side))
    next_tokens: tuple[NextToken, ...] = field(default=(), metadata=_list_of(NextToken))
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
    at: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    body: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verification(Resource):
    """Whether hashes, factors and replicas agree; `findings` say in words what does not."""

    ok: bool
    entries: int = 0
    head: int = 0
    findings: tuple[Any, ...] = field(default=(), metadata=AS_TUPLE)
    replicas: tuple[Json, ...] = field(default=(), metadata=AS_TUPLE)

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
    roles: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)
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
    capacity: Json | None = None
    workers: tuple[Worker, ...] = field(default=(), metadata=_list_of(Worker))
