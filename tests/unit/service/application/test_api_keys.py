"""Keys: what opens, what no longer opens, and what is kept of it."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, update

from service.application.api_keys import REMEMBERED, Key, Keys, Scope, is_token, may
from service.db.database import Database
from service.db.models import ApiKey
from service.errors import Conflict, InvalidInput, NotFound, Unavailable

NUMBERS = count()


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(database: Database, clock: Clock) -> Keys:
    return Keys(database, clock)


def name() -> str:
    return f"k{next(NUMBERS)}"


def rows(database: Database) -> list[ApiKey]:
    with database.read() as session:
        return list(session.scalars(select(ApiKey)))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.sets(st.sampled_from(Scope), min_size=1)),
        st.tuples(st.just("revoke"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.floats(REMEMBERED, 100)),
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
@given(steps=STEPS)
def test_a_token_verifies_iff_it_was_made_and_not_revoked(database: Database, steps: list[Any]) -> None:
    """Whatever is made, revoked and tried: exactly the tokens that were given out and not revoked open."""
    clock = Clock()
    keys = Keys(database, clock)
    made: list[tuple[Key, str]] = []
    revoked: set[str] = set()

    def expect(token: str) -> None:
        wanted = {known: key for key, known in made if key.name not in revoked}.get(token)
        found = keys.verify(token)
        assert (found and found.id) == (wanted and wanted.id)
        assert found is None or found.scopes == wanted.scopes  # type: ignore[union-attr]

    for verb, *arguments in steps:
        if verb == "create":
            made.append(keys.create(name(), arguments[0]))
        elif verb == "wait":
            clock.at += arguments[0]
        elif made:
            key, token = made[arguments[0] % len(made)]
            if verb == "revoke":
                keys.revoke(key.name)
                revoked.add(key.name)
                clock.at += REMEMBERED
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
def test_what_was_never_made_opens_nothing(keys: Keys, text: str) -> None:
    """Any other text is no key, and no fault."""
    assert keys.verify(text) is None


def test_of_the_secret_only_a_digest_is_kept(keys: Keys, database: Database) -> None:
    """No column of the table holds the token or its secret."""
    key, token = keys.create(name(), ["read"])
    assert is_token(token)
    (row,) = rows(database)
    kept = " ".join(str(getattr(row, column.key)) for column in ApiKey.__table__.columns)
    assert token.rpartition("_")[2] not in kept
    assert token[31:] not in kept
    assert "digest" not in vars(key)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, Any]]]:
    """Every pair that was compared in constant time."""
    pairs: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def compare(a: Any, b: Any) -> bool:
        pairs.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    return pairs


def test_an_unknown_id_costs_what_a_wrong_secret_costs(
    keys: Keys, database: Database, compared: list[tuple[Any, Any]]
) -> None:
    """Both read one row and compare two digests of one length, so that ids cannot be found out by timing."""
    _, token = keys.create(name(), ["read"])
    keys.verify(token)
    read: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: read.append(args[2]))
    costs = []
    for wrong in (token[:31] + "_" * 43, token[:4] + "0" * 26 + token[30:]):
        read.clear(), compared.clear()
        assert keys.verify(wrong) is None
        costs.append((list(read), [(len(a), len(b)) for a, b in compared]))
    assert costs[0] == costs[1]
    assert costs[0][1] == [(64, 64)]


def test_a_verified_key_is_remembered_for_a_moment(keys: Keys, database: Database, clock: Clock) -> None:
    """Within five seconds it is not looked up again, and then it is: so long a revocation takes at most."""
    key, token = keys.create(name(), ["read"])
    assert keys.remembered(token) is None
    assert keys.verify(token)
    Keys(database).revoke(key.name)
    clock.at += REMEMBERED - 0.01
    assert keys.remembered(token) == keys.verify(token) is not None
    clock.at += 0.01
    assert keys.remembered(token) is None
    assert keys.verify(token) is None
    assert REMEMBERED <= 5


def test_the_last_use_is_written_once_a_minute(keys: Keys, database: Database, clock: Clock) -> None:
    """The first use is noted at once, and later ones at most once a minute."""
    key, token = keys.create(name(), ["read"])
    assert key.last_used is None
    keys.verify(token)
    (first,) = keys.all()
    assert first.last_used is not None
    clock.at += REMEMBERED
    keys.verify(token)
    assert keys.all() == [first]
    with database.session() as session:
        earlier = first.last_used - timedelta(seconds=61)
        session.execute(update(ApiKey).values(last_used=earlier))
    clock.at += REMEMBERED
    keys.verify(token)
    (later,) = keys.all()
    assert later.last_used is not None
    assert later.last_used > earlier


def test_a_use_that_cannot_be_noted_opens_all_the_same(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is not refused because a database that can be read cannot be written."""
    _, token = keys.create(name(), ["read"])

    def fails() -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(database, "session", fails)
    assert keys.verify(token)


def test_a_database_that_is_down_is_no_verdict() -> None:
    """Whether a key opens is then not known: that is an error, neither a yes nor a no."""
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    keys = Keys(database)
    with pytest.raises(Unavailable):
        keys.verify("pal_" + "0" * 26 + "_" + "a" * 43)
    with pytest.raises(Unavailable):
        keys.exist()
    database.close()


def test_a_name_is_given_once(keys: Keys) -> None:
    """The actor in the ledger is one key for ever: not even a revoked one's name is given again."""
    taken = name()
    keys.create(taken, ["read"])
    keys.revoke(taken)
    with pytest.raises(Conflict):
        keys.create(taken, ["read"])
    assert len(keys.all()) == 1


def test_revoking_is_final_and_harmless_to_repeat(keys: Keys) -> None:
    """The time of the first revocation stays; a name that no key has is told."""
    key, _ = keys.create(name(), ["read"])
    first = keys.revoke(key.name)
    assert first.revoked is not None
    assert keys.revoke(key.name) == first
    with pytest.raises(NotFound):
        keys.revoke("nobody")


def test_a_key_holds_what_it_was_made_with(keys: Keys) -> None:
    """Scopes and limits come back from the table as they were given; the list has the oldest first."""
    first, _ = keys.create(name(), ["edit", "read"], requests_per_minute=7, max_queued=3)
    second, _ = keys.create(name(), ["admin"])
    assert keys.all() == [first, second]
    assert (first.scopes, first.requests_per_minute, first.max_queued) == ({Scope.READ, Scope.EDIT}, 7, 3)
    assert (second.scopes, second.requests_per_minute, second.max_queued) == ({Scope.ADMIN}, None, None)


@pytest.mark.parametrize("wrong", ["", "A", "a b", "-a", "a" * 65, "a\n", "ключ", "deadbeef0123"])
def test_a_name_is_plain(keys: Keys, wrong: str) -> None:
    """A name is short and plain, and cannot be taken for a root key's digest."""
    with pytest.raises(InvalidInput):
        keys.create(wrong, ["read"])


@pytest.mark.parametrize("wrong", [[], ["write"], ["read", ""], ["READ"]])
def test_scopes_are_known_ones(keys: Keys, wrong: list[str]) -> None:
    """A key opens something, and something that there is."""
    with pytest.raises(InvalidInput):
        keys.create(name(), wrong)


@pytest.mark.parametrize("wrong", [{"requests_per_minute": 0}, {"max_queued": -1}, {"max_queued": 2**31}])
def test_limits_are_positive(keys: Keys, wrong: dict[str, int]) -> None:
    """A limit that nothing could pass, or that the table cannot hold, is refused."""
    with pytest.raises(InvalidInput):
        keys.create(name(), ["read"], **wrong)


def test_whether_keys_exist(keys: Keys, clock: Clock, database_url: str) -> None:
    """From the first key on there are keys, seen by other processes within five seconds; a revoked one counts."""
    assert not keys.exist()
    other = Keys(keys.database)
    other.revoke(other.create(name(), ["read"])[0].name)
    assert not keys.exist()
    clock.at += REMEMBERED
    assert keys.exist()


def test_before_the_tables_there_are_no_keys(database_url: str) -> None:
    """A database that was never migrated holds no key."""
    database = Database(database_url)
    assert not Keys(database).exist()
    database.close()


def test_admin_may_everything() -> None:
    """`admin` opens everything, and every other scope only itself."""
    for needed in Scope:
        assert [held for held in Scope if may([held], needed)] == sorted(
            {needed, Scope.ADMIN}, key=list(Scope).index
        )
        assert not may([], needed)
