"""Responses of the service as frozen dataclasses.

Each keeps the whole JSON object as `raw`, including the members that this client does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, ClassVar, Self

from palimpsest import notebook

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Base class of all responses."""

    raw: Json = field(default_factory=dict, repr=False, compare=False)  #: the JSON object of the response

    @classmethod
    def from_json(cls, data: Json) -> Self:
        """Return the record of a JSON object. Unknown members stay in `raw`; null means the default."""
        values: dict[str, Any] = {"raw": data}
        for member in fields(cls):
            value = data.get(member.name)
            if value is not None and member.name != "raw":
                values[member.name] = member.metadata["read"](value) if "read" in member.metadata else value
        return cls(**values)


def _parsed_by(parser: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Field metadata: convert the JSON value with `parser`."""
    return {"read": parser}


def _list_of(kind: type[Resource]) -> Mapping[str, Any]:
    """Field metadata: convert a JSON array to a tuple of records."""
    return _parsed_by(lambda items: tuple(map(kind.from_json, items)))


AS_TUPLE = _parsed_by(tuple)
AS_TIMESTAMP = _parsed_by(datetime.fromisoformat)


@dataclass(frozen=True, kw_only=True)
class Progress(Resource):
    """Progress of a job: `done` of `total` steps of a phase; `total` is 0 when it is unknown."""

    phase: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None  #: an estimate, where there is one


@dataclass(frozen=True, kw_only=True)
class JobFailure(Resource):
    """Why a job failed. `code` is the stable identifier of the error."""

    code: str = ""
    title: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Job(Resource):
    """Fields of every job. `kind` and `links` identify the specific resource of a listed job."""

    path: ClassVar[str] = "/jobs"
    open_statuses: ClassVar[tuple[str, ...]] = ("queued", "running")

    id: str
    status: str
    kind: str = ""
    progress: Progress | None = field(default=None, metadata=_parsed_by(Progress.from_json))
    error: JobFailure | None = field(default=None, metadata=_parsed_by(JobFailure.from_json))
    actor: str = ""
    cancelled_by: str | None = None
    attempts: int = 0
    created: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    started: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    ended: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    links: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the id, the status and what the job is about; `raw` has everything."""
        about = self._about()
        return f"{type(self).__name__}({self.id!r}, {self.status}{f', {about}' if about else ''})"

    def _about(self) -> str:
        return self.kind

    @property
    def finished(self) -> bool:
        """Whether the job has ended, successfully or not."""
        return self.status not in self.open_statuses

    @property
    def reason(self) -> str:
        """Why the job failed; empty if it did not."""
        return self.error.detail if self.error else ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Edit(Job):
    """An edit. `result` has the measurements before and after."""

    path: ClassVar[str] = "/edits"

    subject: str
    prompt: str
    target_new: str | None = None
    target_true: str | None = None
    objective: str = "write"
    on_conflict: str = "report"
    method: str = ""
    form: str | None = None
    hparams: Json | None = None
    batch: str | None = None  #: the name that the edit shares with others
    dry_run: bool = False
    version: int | None = None  #: the version that the edit created
    reverted_version: int | None = None  #: the version that its revert created
    result: Json | None = None
    related: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)  #: active edits of the same subject
    superseded_by: str | None = None

    def _about(self) -> str:
        statement = self.prompt.replace("{}", self.subject)
        return (
            f"{statement!r} \u2192 {self.target_new!r}"
            if self.target_new
            else f"{self.objective} {statement!r}"
        )

    def _repr_html_(self) -> str:
        return notebook.edit_html(self)

    @property
    def applied(self) -> bool:
        """Whether the edit was committed to the ledger; true also after a revert."""
        return self.version is not None

    @property
    def reason(self) -> str:
        """Why the edit was not applied: the reason of the guard, or the error."""
        return str((self.result or {}).get("reason") or super().reason)

    @property
    def also_changed(self) -> list[Json]:
        """The other prompts whose greedy answers the edit changes: `prompt`, `subject`, `before` and `after`."""
        return list((self.result or {}).get("also_changed") or [])

    @property
    def before(self) -> float | None:
        """The probability of the new object before the edit; of the true object for `erase` and `amplify`."""
        return self._probability("before")

    @property
    def after(self) -> float | None:
        """The same probability after the edit."""
        return self._probability("after")

    def _probability(self, when: str) -> float | None:
        rewrite = (self.result or {}).get("rewrite") or {}
        value = (rewrite.get(when) or {}).get("new")
        return None if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class RevertResult(Resource):
    """What was done with each of several edits, by their ids. `version` is the newest version."""

    version: int
    reverted: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)
    cancelled: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)
    unchanged: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)


@dataclass(frozen=True, kw_only=True)
class TableLine(Resource):
    """A line of a CSV table: the request that it states, or what is wrong with it."""

    line: int
    edit: Json | None = None
    error: Json | None = None  #: `detail`, and the `field` and the `column` at fault where it is one
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class EditTable(Resource):
    """The lines of a CSV table below its header."""

    items: tuple[TableLine, ...] = field(default=(), metadata=_list_of(TableLine))
    valid: int = 0
    seconds_per_edit: float | None = None  #: an estimate from the newest edits, where there are some


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(Job):
    """A causal trace. `result` has the tokens, the scores and the strongest state of each kind."""

    path: ClassVar[str] = "/trace"

    request: Json = field(default_factory=dict)
    version: int | None = None  #: the traced version
    result: Json | None = None

    def _about(self) -> str:
        return repr(self.request.get("prompt") or "a conversation")

    def _repr_html_(self) -> str:
        return notebook.trace_html(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Job):
    """An evaluation. Lists omit its `result`."""

    path: ClassVar[str] = "/evaluations"

    request: Json = field(default_factory=dict)
    result: Json | None = None

    def _about(self) -> str:
        return f"{self.request.get('method', '')}, {self.request.get('mode', '')}"

    def _repr_html_(self) -> str:
        return notebook.evaluation_html(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Training(Job):
    """A training of the learned part of a method. `result` has its figures on held-out subjects."""

    path: ClassVar[str] = "/trainings"

    request: Json = field(default_factory=dict)
    result: Json | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Export(Job):
    """A version as a file; `result` describes the file."""

    path: ClassVar[str] = "/exports"

    request: Json = field(default_factory=dict)
    result: Json | None = None


@dataclass(frozen=True, kw_only=True)
class Usage(Resource):
    """Numbers of prompt tokens and generated tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation(Resource):
    """A generated text, and the version that generated all of its tokens."""

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
    """A token of a stream. The last one has an empty text and the `finish_reason`.

    `reset` is true when another worker took over and generates again from the prompt: discard all earlier tokens.
    """

    text: str
    version: int
    reset: bool = False
    finish_reason: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Side(Resource):
    """The text that one version generated."""

    version: int
    text: str
    tokens: tuple[int, ...] = field(default=(), metadata=AS_TUPLE)
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NextToken(Resource):
    """A next token and its probability under each version."""

    token: str
    id: int
    p: tuple[float, ...] = field(default=(), metadata=AS_TUPLE)


@dataclass(frozen=True, kw_only=True)
class Comparison(Resource):
    """Two versions on one prompt. `next_tokens` are sorted by the difference of their probabilities, largest first."""

    prompt: str = ""
    sides: tuple[Side, ...] = field(default=(), metadata=_list_of(Side))
    next_tokens: tuple[NextToken, ...] = field(default=(), metadata=_list_of(NextToken))
    total_variation: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Entry(Resource):
    """An entry of the ledger: it applies or reverts an edit and creates `version`. `hash` covers `body`."""

    version: int
    kind: str
    edit_id: str
    actor: str = ""
    hash: str = ""
    previous: str = ""
    at: datetime | None = field(default=None, metadata=AS_TIMESTAMP)
    body: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NamedVersion(Resource):
    """A name that was given to a version. `model` is the model name that means this version below /v1."""

    name: str
    version: int
    model: str = ""
    actor: str = ""
    created: datetime | None = field(default=None, metadata=AS_TIMESTAMP)


@dataclass(frozen=True, kw_only=True)
class FactChange(Resource):
    """A fact whose active edit differs between two versions; `before` and `after` are null where there is none."""

    change: str  #: added, removed or replaced
    subject: str
    prompt: str = ""
    before: Json | None = None
    after: Json | None = None


@dataclass(frozen=True, kw_only=True)
class Verification(Resource):
    """Whether the chains, the signatures, the factors and the replicas match. `findings` describe each mismatch."""

    ok: bool
    entries: int = 0
    head: int = 0
    head_hash: str | None = None
    record: Json | None = None
    public_key: str | None = None
    findings: tuple[Any, ...] = field(default=(), metadata=AS_TUPLE)
    finding_count: int = 0
    replicas: tuple[Json, ...] = field(default=(), metadata=AS_TUPLE)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def anchor(self) -> str | None:
        """The newest ledger entry, for `expect` of a later verification."""
        return f"{self.head}:{self.head_hash}" if self.head_hash else None

    @property
    def record_anchor(self) -> str | None:
        """The newest audit record, for `expect_record` of a later verification."""
        return f"{self.record['position']}:{self.record['hash']}" if self.record else None


@dataclass(frozen=True, kw_only=True)
class Worker(Resource):
    """A worker: its state, its version, and `lag` versions behind head."""

    id: str
    state: str
    version: int = 0
    lag: int = 0
    digest: str | None = None
    reason: str | None = None
    roles: tuple[str, ...] = field(default=(), metadata=AS_TUPLE)
    age: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Model(Resource):
    """The served model. `raw` also has its recipe and sizes."""

    name: str
    fingerprint: str = ""
    head: int = 0
    active_edits: int = 0
    chat: bool = False  #: whether it has a chat template, which the messages of a conversation need
    architecture: str = ""
    layers: int = 0
    jobs: Json = field(default_factory=dict)
    capacity: Json | None = None
    workers: tuple[Worker, ...] = field(default=(), metadata=_list_of(Worker))
