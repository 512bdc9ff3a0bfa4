"""API keys. A key has a name, scopes and limits. Only a digest of its secret is stored.

A token is `pal_<id>_<secret>`. The row is looked up by id and the secret is compared in constant time. An unknown id
costs the same read and the same comparison as a wrong secret.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import inspect, select, update
from sqlalchemy.exc import IntegrityError

from service.application.caller import DEFAULT_LIMITS, CallerLimits
from service.db.database import Database
from service.db.models import ApiKey, AuditRecord, now
from service.errors import Conflict, InvalidInput, NotFound, Unavailable
from service.kit.ids import new_id
from service.ledger import audit
from service.ledger.audit_coverage import API_KEY

log = logging.getLogger(__name__)

CACHE_SECONDS = (
    5.0  #: seconds for which a verified token is cached; a revocation takes effect within this time
)
LAST_USED_INTERVAL = timedelta(minutes=1)  #: minimum time between two writes of the time of last use

_TOKEN = re.compile(r"pal_([0-9A-HJKMNP-TV-Z]{26})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ROOT_NAME = "root"  #: of the key in the settings, as an actor
_NO_DIGEST = "0" * 64  #: compared with the secret when no key has the id


class Scope(StrEnum):
    """A permission of a key. `admin` includes all others."""

    READ = "read"
    EDIT = "edit"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True)
class ApiKeyInfo:
    """A key without its secret."""

    id: str
    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_queued: int | None
    max_concurrent: int | None
    weight: int
    created: datetime
    last_used: datetime | None
    revoked: datetime | None

    @property
    def limits(self) -> CallerLimits:
        return CallerLimits(**{field.name: getattr(self, field.name) for field in fields(CallerLimits)})


def has_scope(granted: Iterable[Scope], required: Scope) -> bool:
    """Return whether the granted scopes include the required one."""
    return required in granted or Scope.ADMIN in granted


def is_token(text: str) -> bool:
    """Return whether a text has the form of a token."""
    return _TOKEN.fullmatch(text) is not None


class ApiKeys:
    """The keys of a service. Thread-safe. All methods except `cached` block on the database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self.database = database
        self._clock = clock
        self._verified: dict[
            str, tuple[ApiKeyInfo, float]
        ] = {}  # digest of a token -> (its key, time of the read)
        self._any_found = False
        self._none_until = float("-inf")

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        limits: CallerLimits = DEFAULT_LIMITS,
    ) -> tuple[ApiKeyInfo, str]:
        """Create a key and return it with its token, which is not stored. Raises Conflict for a name that was used
        before."""
        _check_name(name)
        _check_limits(asdict(limits))
        secret = secrets.token_urlsafe(32)
        row = ApiKey(
            id=new_id("key"),
            name=name,
            digest=_digest(secret),
            scopes=sorted(_scopes(scopes)),
            created=now(),
            **asdict(limits),
        )
        try:
            with self.database.write_session() as session:
                session.add(row)
                audit.append(session, API_KEY, [(row.id,)])
                key = _to_key_info(row)
        except IntegrityError:
            raise Conflict(
                f"There is or was a key named {name!r}, and the ledger identifies keys by name: choose another name."
            ) from None
        return key, f"pal_{key.id.removeprefix('key_')}_{secret}"

    def all(self) -> list[ApiKeyInfo]:
        """Return all keys, also revoked ones, oldest first."""
        with self.database.read_session() as session:
            return [_to_key_info(row) for row in session.scalars(select(ApiKey).order_by(ApiKey.id))]

    def revoke(self, name: str) -> ApiKeyInfo:
        """Revoke a key; idempotent. Every process rejects it after at most CACHE_SECONDS."""
        with self.database.write_session() as session:
            row = session.scalar(select(ApiKey).where(ApiKey.name == name))
            if row is None:
                raise NotFound(f"There is no key named {name!r}: `palimpsest keys list` shows all keys.")
            if row.revoked is None:
                row.revoked = now()
                audit.append(session, API_KEY, [(row.id,)])
            return _to_key_info(row)

    def any_exist(self) -> bool:
        """Return whether a key was ever created, also a revoked one. From then on every request needs a key."""
        checked_at = self._clock()
        if not self._any_found and checked_at >= self._none_until:
            self._any_found = self._query_any()
            self._none_until = checked_at + CACHE_SECONDS
        return self._any_found

    def cached(self, token: str) -> ApiKeyInfo | None:
        """Return the key of a token that was verified within CACHE_SECONDS. Does not block."""
        key, read = self._verified.get(_digest(token), (None, 0.0))
        return key if self._clock() < read + CACHE_SECONDS else None

    def verify(self, token: str) -> ApiKeyInfo | None:
        """Return the key of a token; None when there is none, when it is revoked or when the secret is wrong.

        A row that has no valid audit record was not written by this service, and is not accepted.
        """
        if (cached_key := self.cached(token)) is not None:
            return cached_key
        read_at, match = self._clock(), _TOKEN.fullmatch(token)
        if match is None:
            return None
        with self.database.read_session() as session:
            row = session.get(ApiKey, f"key_{match[1]}")
            secret_matches = hmac.compare_digest(
                _digest(match[2]), row.digest if row is not None else _NO_DIGEST
            )
            if row is None or not secret_matches or row.revoked is not None:
                return None
            if not audit.is_intact(session, API_KEY, (row.id,)):
                log.error("key refused: its row differs from its audit record", extra={"key": row.name})
                return None
        key = _to_key_info(row)
        self._record_use(key)
        self._verified[_digest(token)] = key, read_at
        return key

    def _query_any(self) -> bool:
        with self.database.read_session() as session:
            if not inspect(session.connection()).has_table(AuditRecord.__tablename__):
                return False  # the database is not migrated yet
            recorded = select(AuditRecord.position).where(AuditRecord.kind == API_KEY)
            return any(
                session.scalar(query.limit(1)) is not None for query in (select(ApiKey.id), recorded)
            )  # a deleted key is still in the audit records

    def _record_use(self, key: ApiKeyInfo) -> None:
        """Store the time of the last use. An outage is ignored: it does not make the key invalid."""
        used_at = now()
        if key.last_used is not None and used_at - key.last_used < LAST_USED_INTERVAL:
            return
        with suppress(Unavailable), self.database.write_session() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key.id).values(last_used=used_at))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _to_key_info(row: ApiKey) -> ApiKeyInfo:
    fields: dict[str, Any] = {name: getattr(row, name) for name in ApiKeyInfo.__dataclass_fields__}
    return ApiKeyInfo(**fields | {"scopes": frozenset(map(Scope, row.scopes))})


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"a key cannot be named {name!r}: use 1 to 64 of a-z, 0-9, dot, dash and underscore.", "name"
        )
    if name == ROOT_NAME:  # the ledger could not distinguish them
        raise InvalidInput(
            f"{name!r} is the name of the key in PALIMPSEST_API_KEY: choose another name.", "name"
        )


def _check_limits(limits: dict[str, int | None]) -> None:
    for name, limit in limits.items():
        if limit is not None and not 1 <= limit < 2**31:
            raise InvalidInput(f"`{name}` must be at least 1 and below {2**31}.", name)


def _scopes(names: Iterable[str]) -> set[Scope]:
    names = set(names)
    if not names or not names <= set(Scope):
        raise InvalidInput(f"`scopes` must be some of {', '.join(Scope)}.", "scopes")
    return set(map(Scope, names))
