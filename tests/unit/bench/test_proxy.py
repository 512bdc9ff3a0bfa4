"""Faults of the TCP proxy: bench/proxy.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from bench.proxy import LOCALHOST, Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy of an echo server."""
    with socket.create_server((LOCALHOST, 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        proxy = Proxy(listener.getsockname()[1])
        yield proxy
        proxy.close()


def _echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo_connection, args=(connection,), daemon=True).start()


def _echo_connection(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(1000):
                connection.sendall(data)
        except OSError:
            return


def _connect(proxy: Proxy) -> socket.socket:
    client = socket.create_connection((LOCALHOST, proxy.port), timeout=30)
    client.sendall(b"first")
    assert client.recv(100) == b"first"
    return client


def test_passes_bytes_on(proxy: Proxy) -> None:
    """Without a fault, the proxy forwards data and an orderly shutdown."""
    with _connect(proxy) as client:
        client.sendall(b"x" * 200_000)
        client.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert received == b"x" * 200_000


def test_cut_resets_connections(proxy: Proxy) -> None:
    """`cut` resets open connections. New connections work."""
    with _connect(proxy) as client:
        assert proxy.cut() == 2
        with pytest.raises(ConnectionResetError):
            client.recv(100)
    _connect(proxy).close()


def test_stall_lets_nothing_pass(proxy: Proxy) -> None:
    """A stalled connection stays open and forwards nothing. Data sent meanwhile arrives after `heal`."""
    with _connect(proxy) as client:
        proxy.stall()
        client.sendall(b"second")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(100)
        proxy.heal()
        client.settimeout(30)
        assert client.recv(100) == b"second"


def test_refuse_lets_nobody_in(proxy: Proxy) -> None:
    """`refuse` resets connections and rejects new ones until `heal`, which listens on the same port."""
    with _connect(proxy) as client:
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOCALHOST, proxy.port), timeout=30)
    proxy.heal()
    _connect(proxy).close()


def test_a_dead_server_resets_the_client() -> None:
    """If the target is not listening, the client gets a connection error at once, possibly while it
    connects."""
    with socket.socket() as bound:  # bound and not listening, so that no other process can use the port
        bound.bind((LOCALHOST, 0))
        proxy = Proxy(bound.getsockname()[1])
        try:
            with (
                pytest.raises(ConnectionError),
                socket.create_connection((LOCALHOST, proxy.port), timeout=30) as client,
            ):
                client.recv(100)
                client.sendall(b"x")
                client.recv(100)
        finally:
            proxy.close()
