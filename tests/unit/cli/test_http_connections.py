"""The table of connections: cli.http_connections."""

from __future__ import annotations

import resource

import pytest

from cli.http_connections import (
    EXTRA_CONNECTIONS,
    MAX_CONNECTIONS,
    MIN_CONNECTIONS,
    ConnectionTable,
    TimeLimits,
    default_max_connections,
)

NOW = 100.0  #: seconds


class FakeConnection:
    """A connection whose state a test sets. By default it has sent nothing since time 0."""

    def __init__(self, address: str = "a", idle_since: float | None = 0.0, request_count: int = 0) -> None:
        self.address, self.idle_since, self.request_count = address, idle_since, request_count
        self.extra = self.evicted = False

    def close_if_late(self, at: float) -> None:
        """Do nothing."""

    def evict(self) -> None:
        self.evicted = True


def full_table(*connections: FakeConnection) -> ConnectionTable:
    """Return a table that these connections fill."""
    table = ConnectionTable(len(connections), TimeLimits(), clock=lambda: NOW)
    for connection in connections:
        assert table.admit(connection)
    return table


def evicted_names(**connections: FakeConnection) -> list[str]:
    """Fill a table, admit one more, and return the names of the connections that were closed for it."""
    table = full_table(*connections.values())
    assert table.admit(newest := FakeConnection("new"))
    assert not newest.extra
    return [name for name, connection in connections.items() if connection.evicted]


def test_the_longest_waiting_is_closed_first() -> None:
    """Among connections of one address that sent nothing, the oldest is closed for a new one."""
    assert evicted_names(b=FakeConnection(idle_since=2.0), a=FakeConnection(idle_since=1.0)) == ["a"]


def test_a_connection_without_a_request_is_closed_before_one_that_had_one() -> None:
    """A connection that has served a request is kept longer than one that has not."""
    served, silent = FakeConnection(idle_since=1.0, request_count=1), FakeConnection(idle_since=2.0)
    assert evicted_names(served=served, silent=silent) == ["silent"]


def test_a_connection_that_has_just_been_opened_is_kept() -> None:
    """A connection that may still send its request in time is kept longer than one that has served a request."""
    served, newest = FakeConnection(idle_since=NOW, request_count=1), FakeConnection(idle_since=NOW - 0.5)
    assert evicted_names(served=served, newest=newest) == ["served"]


def test_an_address_with_many_connections_loses_them_first() -> None:
    """The address with most idle connections loses one, although another has waited longer."""
    many = {f"many{n}": FakeConnection("b", idle_since=5.0 + n) for n in range(3)}
    assert evicted_names(one=FakeConnection("a", idle_since=1.0), **many) == ["many0"]


def test_a_busy_connection_is_never_closed() -> None:
    """A connection with a request in progress is not closed for another."""
    assert evicted_names(busy=FakeConnection(idle_since=None), idle=FakeConnection(idle_since=9.0)) == [
        "idle"
    ]


def test_connections_above_the_limit_are_few() -> None:
    """While all are busy, a few extra connections are admitted; the idle ones among them give way."""
    table = full_table(FakeConnection(idle_since=None), FakeConnection(idle_since=None))
    extra = [FakeConnection(idle_since=float(n)) for n in range(EXTRA_CONNECTIONS + 1)]
    assert all(table.admit(connection) and connection.extra for connection in extra)
    assert [connection.evicted for connection in extra] == [True] + [False] * EXTRA_CONNECTIONS
    for connection in extra:
        connection.idle_since = None
    assert not table.admit(FakeConnection())


def test_a_closed_connection_makes_room() -> None:
    """After a connection was removed, another is admitted, and nothing is closed for it."""
    first, second = FakeConnection(), FakeConnection()
    table = full_table(first, second)
    table.remove(first)
    table.remove(first)
    assert table.admit(FakeConnection())
    assert not second.evicted


@pytest.mark.parametrize(
    ("open_files", "expected"),
    [(64, MIN_CONNECTIONS), (256, 80), (1024, 464), (10**6, MAX_CONNECTIONS), (resource.RLIM_INFINITY, MAX_CONNECTIONS)],
)  # fmt: skip
def test_the_limit_follows_the_open_files(
    monkeypatch: pytest.MonkeyPatch, open_files: int, expected: int
) -> None:
    """Half of the open files that are not reserved may be connections, within fixed bounds."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (open_files, open_files))
    assert default_max_connections() == expected
