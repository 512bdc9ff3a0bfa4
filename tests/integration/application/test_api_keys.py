"""API keys: verification, revocation, scopes, limits and storage."""

from __future__ import annotations

import hmac
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, update

from service.application.api_keys import CACHE_SECONDS, ApiKeyInfo, ApiKeys, Scope, has_scope, is_token
from service.application.caller import CallerLimits
from service.db.database import Database
from service.db.models import ApiKey
from service.errors import Conflict, InvalidInput, NotFound, Unavailable

NUMBERS = count()


class FakeClock:
    """A manual clock."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def keys(database: Database, clock: FakeClock) -> ApiKeys:
    return ApiKeys(database, clock)


def unique_name() -> str:
    return f"k{next(NUMBERS)}"


def key_rows(database: Database) -> list[ApiKey]:
    with database.read_session() as session:
        return list(session.scalars(select(ApiKey)))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.sets(st.sampled_from(Scope), min_size=1)),
        st.tuples(st.just("revoke"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.floats(CACHE_SECONDS, 100)),
        st.tuples(st.just("verify"), st.integers(0, 5)),
        st.tuples(
            st.just("forge"), st.integers(0, 5), st.integers(0, 5), st.integers(4, 73), st.characters()
        ),
    ),
    max_size=20,
)


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(steps=OPERATIONS)
def test_a_token_verifies_iff_it_was_made_and_not_revoked(database: Database, steps: list[Any]) -> None:
    """After any sequence of operations exactly the tokens that were created and not revoked are valid."""
    clock = FakeClock()
    keys = ApiKeys(database, clock)
    made: list[tuple[ApiKeyInfo, str]] = []
    revoked: set[str] = set()

    def expect(token: str) -> None:
        wanted = {known: key for key, known in made if key.name not in revoked}.get(token)
        found = keys.verify(token)
        assert (found and found.id) == (wanted and wanted.id)
        assert found is None or found.scopes == wanted.scopes  # type: ignore[union-attr]

    for verb, *arguments in steps:
        if verb == "create":
            made.append(keys.create(unique_name(), arguments[0]))
        elif verb == "wait":
            clock.at += arguments[0]
        elif made:
            key, token = made[arguments[0] % len(made)]
            if verb == "revoke":
                keys.revoke(key.name)
                revoked.add(key.name)
                clock.at += CACHE_SECONDS
            elif verb == "verify":
                expect(token)
            else:
                _, number, place, character = arguments
                other = made[number % len(made)][1]
                expect(token[:31] + other[31:])  # the id of one and the secret of another
                expect(token[:place] + character + token[place + 1 :])
                expect(token[:place])
                expect(token + character)


@pytest.mark.parametrize("text", ["", "pal_", "pal__", "pal_x_y", "é" * 74, "\ud800", "pal_" + "0" * 26 + "_" + "a" * 43, "x" * 10**6])  # fmt: skip
def test_invalid_tokens_are_rejected(keys: ApiKeys, text: str) -> None:
    """A malformed token is rejected without an error."""
    assert keys.verify(text) is None


def test_only_a_digest_of_the_secret_is_stored(keys: ApiKeys, database: Database) -> None:
    """No column of the table holds the token or its secret."""
    key, token = keys.create(unique_name(), ["read"])
    assert is_token(token)
    (row,) = key_rows(database)
    kept = " ".join(str(getattr(row, column.key)) for column in ApiKey.__table__.columns)
    secret = token.split("_", 2)[2]  # which can contain underscores
    assert len(secret) == 43 and secret not in kept
    assert "digest" not in vars(key)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Return the pairs that are compared in constant time."""
    pairs: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def compare(a: Any, b: Any) -> bool:
        pairs.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    return pairs


def test_an_unknown_id_costs_what_a_wrong_secret_costs(
    keys: ApiKeys, database: Database, compared: list[tuple[Any, Any]]
) -> None:
    """An unknown id and a wrong secret cause the same reads and one comparison of digests, so timing does not
    reveal ids."""
    _, token = keys.create(unique_name(), ["read"])
    keys.verify(token)
    read: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: read.append(args[2]))
    costs = []
    for wrong in (token[:31] + "_" * 43, token[:4] + "0" * 26 + token[30:]):
        read.clear()
        compared.clear()
        assert keys.verify(wrong) is None
        costs.append((list(read), [(len(a), len(b)) for a, b in compared]))
    assert costs[0] == costs[1]
    assert costs[0][1] == [(64, 64)]


def test_a_verified_key_is_cached(keys: ApiKeys, database: Database, clock: FakeClock) -> None:
    """A verified key is cached for at most five seconds; then a revocation takes effect."""
    key, token = keys.create(unique_name(), ["read"])
    assert keys.cached(token) is None
    assert keys.verify(token)
    ApiKeys(database).revoke(key.name)
    clock.at += CACHE_SECONDS - 0.01
    assert keys.cached(token) == keys.verify(token) is not None
    clock.at += 0.01
    assert keys.cached(token) is None
    assert keys.verify(token) is None
    assert CACHE_SECONDS <= 5


def test_the_last_use_is_written_once_a_minute(keys: ApiKeys, database: Database, clock: FakeClock) -> None:
    """The first use is written immediately, and later ones at most once a minute."""
    key, token = keys.create(unique_name(), ["read"])
    assert key.last_used is None
    keys.verify(token)
    (first,) = keys.all()
    assert first.last_used is not None
    clock.at += CACHE_SECONDS
    keys.verify(token)
    assert keys.all() == [first]
    with database.write_session() as session:
        earlier = first.last_used - timedelta(seconds=61)
        session.execute(update(ApiKey).values(last_used=earlier))
    clock.at += CACHE_SECONDS
    keys.verify(token)
    (later,) = keys.all()
    assert later.last_used is not None
    assert later.last_used > earlier


def test_verify_survives_a_failed_last_used_write(
    keys: ApiKeys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is valid although its last use cannot be written."""
    _, token = keys.create(unique_name(), ["read"])

    def fails() -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(database, "write_session", fails)
    assert keys.verify(token)


def test_verify_raises_when_the_database_is_down() -> None:
    """When the database is down verification raises Unavailable and neither accepts nor rejects the key."""
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    keys = ApiKeys(database)
    with pytest.raises(Unavailable):
        keys.verify("pal_" + "0" * 26 + "_" + "a" * 43)
    with pytest.raises(Unavailable):
        keys.any_exist()
    database.close()


def test_a_name_is_given_once(keys: ApiKeys) -> None:
    """The name of a key cannot be used again, also after its revocation."""
    taken = unique_name()
    keys.create(taken, ["read"])
    keys.revoke(taken)
    with pytest.raises(Conflict):
        keys.create(taken, ["read"])
    assert len(keys.all()) == 1


def test_revoking_is_final_and_harmless_to_repeat(keys: ApiKeys) -> None:
    """A repeated revocation keeps the time of the first; an unknown name is not found."""
    key, _ = keys.create(unique_name(), ["read"])
    first = keys.revoke(key.name)
    assert first.revoked is not None
    assert keys.revoke(key.name) == first
    with pytest.raises(NotFound):
        keys.revoke("nobody")


def test_a_key_holds_what_it_was_made_with(keys: ApiKeys) -> None:
    """Scopes and limits are stored unchanged, and keys are listed oldest first."""
    limits = CallerLimits(7, 5000, 3, 2, weight=4)
    first, _ = keys.create(unique_name(), ["edit", "read"], limits)
    second, _ = keys.create(unique_name(), ["admin"])
    assert keys.all() == [first, second]
    assert (first.scopes, first.limits) == (frozenset({Scope.READ, Scope.EDIT}), limits)
    assert (second.scopes, second.limits) == (frozenset({Scope.ADMIN}), CallerLimits())


@pytest.mark.parametrize("wrong", ["", "A", "a b", "-a", "a" * 65, "a\n", "ключ", "root"])
def test_a_name_is_plain(keys: ApiKeys, wrong: str) -> None:
    """A name that is empty, too long, has other characters or is that of the root key is
    rejected."""
    with pytest.raises(InvalidInput):
        keys.create(wrong, ["read"])


@pytest.mark.parametrize("wrong", [[], ["write"], ["read", ""], ["READ"]])
def test_scopes_are_known_ones(keys: ApiKeys, wrong: list[str]) -> None:
    """A key needs at least one scope, and unknown scopes are rejected."""
    with pytest.raises(InvalidInput):
        keys.create(unique_name(), wrong)


@pytest.mark.parametrize(
    "wrong", [{"requests_per_minute": 0}, {"max_queued": -1}, {"max_queued": 2**31}, {"weight": 0}]
)
def test_limits_are_positive(keys: ApiKeys, wrong: dict[str, int]) -> None:
    """A limit of zero or less, or above the range of its column, is rejected."""
    with pytest.raises(InvalidInput):
        keys.create(unique_name(), ["read"], CallerLimits(**wrong))


def test_whether_keys_exist(keys: ApiKeys, clock: FakeClock, database_url: str) -> None:
    """`any_exist` is true from the first key on, within five seconds in other instances; a revoked key
    counts."""
    assert not keys.any_exist()
    other = ApiKeys(keys.database)
    other.revoke(other.create(unique_name(), ["read"])[0].name)
    assert not keys.any_exist()
    clock.at += CACHE_SECONDS
    assert keys.any_exist()


def test_before_the_tables_there_are_no_keys(database_url: str) -> None:
    """A database without tables has no keys."""
    database = Database(database_url)
    assert not ApiKeys(database).any_exist()
    database.close()


def test_admin_has_every_scope() -> None:
    """`admin` includes every scope, and every other scope includes only itself."""
    for needed in Scope:
        assert [held for held in Scope if has_scope([held], needed)] == sorted(
            {needed, Scope.ADMIN}, key=list(Scope).index
        )
        assert not has_scope([], needed)
