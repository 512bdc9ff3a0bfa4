"""The tables. The migrations in `migrations/` create them; a test compares the two.

JSON is stored as text, so that SQLite and PostgreSQL return exactly the stored value. Times are in UTC.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    DateTime,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def to_json_value(value: Any) -> Any:
    """Return a value as plain JSON: tuples become lists; NaN and infinities become null."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): to_json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(v) for v in value]
    return value


class JsonText(TypeDecorator[Any]):
    """Any JSON value as text; None is NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(to_json_value(value), allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC. SQLite drops the zone, which is restored on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map = {
        str: Text,
        datetime: UtcDateTime,
        dict[str, Any]: JsonText,
        list[str]: JsonText,
        bytes: LargeBinary,
    }


class Model(Base):
    """A model that a worker has registered."""

    __tablename__ = "models"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    info: Mapped[dict[str, Any]]
    tokenizer: Mapped[str] = mapped_column(deferred=True)  #: megabytes, and rarely read
    created: Mapped[datetime]
    registered: Mapped[datetime]  #: time of the last registration by a worker


class Job(Base):
    """A job of any kind. The row is authoritative for its state."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "model", "status"),
        Index(None, "model", "subject"),
        Index(None, "model", "created"),
        Index(None, "model", "batch"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"))
    status: Mapped[str]
    request: Mapped[dict[str, Any]]
    actor: Mapped[str]
    created: Mapped[datetime]
    updated: Mapped[datetime]
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)  #: the fence: writes of older attempts are rejected
    worker: Mapped[str | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    cancelled_by: Mapped[str | None]  #: the actor that cancelled it, or asked for it while it runs
    progress: Mapped[dict[str, Any] | None] = mapped_column(JsonText)
    result: Mapped[dict[str, Any] | None] = mapped_column(JsonText)
    error: Mapped[dict[str, Any] | None] = mapped_column(JsonText)
    subject: Mapped[str]  #: with normalized white space; of an evaluation or export, a short description
    fact_key: Mapped[str | None]  #: equal for edits of one fact; too long for an index, looked up by subject
    dry_run: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int | None]  #: version that an edit created
    reverted_version: Mapped[int | None]
    request_id: Mapped[str | None]  #: of the HTTP request that submitted it, for the logs
    cost: Mapped[float] = mapped_column(
        default=1.0, server_default=text("1")
    )  #: divided by the weight of its actor's key
    exhausted: Mapped[bool] = mapped_column(
        default=False
    )  #: whether it failed because all its attempts were used; it can be retried by hand
    batch: Mapped[str | None]  #: the name that several edits share
    search_text: Mapped[str | None]  #: what a search of edits reads (`service/kit/search_text.py`)


class StoredFactors(Base):
    """The factors of an applied edit, as safetensors."""

    __tablename__ = "factors"

    edit_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    data: Mapped[bytes]
    sha256: Mapped[str]


class StoredGateSpace(Base):
    """The space of the gates of edits (`service/weights/gate_space.py`), or the classifier of statement records
    (`scope_classifier.py` beside it), as safetensors. Its digest is that of its content."""

    __tablename__ = "gate_spaces"

    digest: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class JobArtifact(Base):
    """Named bytes that belong to a job (`service/jobs/artifacts.py`)."""

    __tablename__ = "job_artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[bytes]


class LedgerEntry(Base):
    """An applied or reverted edit. The table is append-only (`service/ledger/ledger.py`)."""

    __tablename__ = "ledger"
    __table_args__ = (UniqueConstraint("model", "edit_id", "kind"), Index(None, "edit_id"))

    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    edit_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    actor: Mapped[str]
    at: Mapped[datetime]
    body: Mapped[dict[str, Any]]
    state: Mapped[str]
    previous: Mapped[str]
    hash: Mapped[str]


class LedgerHead(Base):
    """The active edits at the head of a ledger, so that an append need not read all entries.

    It is derived from the ledger, and is valid while `version` and `hash` are those of the newest entry.
    """

    __tablename__ = "ledger_heads"

    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"), primary_key=True)
    version: Mapped[int]
    hash: Mapped[str]
    active: Mapped[dict[str, Any]]  #: edit id -> [sha256 of its factors, its strength]


class VersionName(Base):
    """The name of a version. A deleted name stays as a row, so that its audit record stays valid."""

    __tablename__ = "version_names"

    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    actor: Mapped[str]
    created: Mapped[datetime]
    deleted: Mapped[datetime | None]
    deleted_by: Mapped[str | None]


class AuditRecord(Base):
    """A signed record of a row that the service shows. The table is append-only (`service/ledger/audit.py`)."""

    __tablename__ = "audit_records"
    __table_args__ = (Index(None, "kind", "subject"),)

    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    subject: Mapped[str]  #: the primary key of the row
    digest: Mapped[str]  #: sha256 of the covered columns of the row; "" if the record covers no row
    body: Mapped[dict[str, Any]]
    at: Mapped[datetime]
    signer: Mapped[str]  #: id of the key
    previous: Mapped[str]
    hash: Mapped[str]
    signature: Mapped[str]


class Attestation(Base):
    """The digest of a worker's weights at a version."""

    __tablename__ = "attestations"

    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    device: Mapped[str]  #: digests are comparable on one kind of device only
    at: Mapped[datetime]
    withdrawn: Mapped[datetime | None]  #: time at which the worker was quarantined


class IdempotencyKey(Base):
    """The resources that the first request with an Idempotency-Key created."""

    __tablename__ = "idempotency"

    actor: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    resources: Mapped[list[str]]
    status_code: Mapped[int]
    created: Mapped[datetime]


class Worker(Base):
    """A worker process. It is alive while its heartbeat is within the lease."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.fingerprint"))
    roles: Mapped[list[str]]
    version: Mapped[int]
    digest: Mapped[str | None]
    heartbeat: Mapped[datetime]
    started: Mapped[datetime]
    host: Mapped[str]
    pid: Mapped[int]
    reason: Mapped[str | None]  #: reason of a quarantine; None while it serves
    preparing: Mapped[dict[str, Any] | None] = mapped_column(
        JsonText
    )  #: progress of what edits need; None when it is ready


class ApiKey(Base):
    """An API key. Only a digest of its secret is stored."""

    __tablename__ = "api_keys"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]  #: the actor in the ledger; unique for ever, also after the key is revoked
    digest: Mapped[str]  #: sha256 of the secret, which is 256 random bits: no slow hash is needed
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]  #: None: the service's default
    tokens_per_minute: Mapped[int | None]  #: None: the service's default
    max_queued: Mapped[int | None]  #: maximum number of queued jobs of this key; None: the service's default
    max_concurrent: Mapped[
        int | None
    ]  #: maximum number of its open calls and streams; None: the service's default
    weight: Mapped[int] = mapped_column(
        default=1, server_default=text("1")
    )  #: of its work where several callers wait
    created: Mapped[datetime]
    last_used: Mapped[datetime | None]
    revoked: Mapped[datetime | None]
