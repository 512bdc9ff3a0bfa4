"""The HTTP server of a worker: workers.health_server."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import Misconfigured
from workers import health_server
from workers.health_server import MAX_CONNECTIONS, HealthServer


class FakeHealthCheck:
    """A health check whose result a test sets."""

    problem: str | None = None

    def __call__(self) -> str | None:
        return self.problem


@pytest.fixture
def health_check() -> FakeHealthCheck:
    return FakeHealthCheck()


@pytest.fixture
def http(health_check: FakeHealthCheck) -> Iterator[httpx.Client]:
    server = HealthServer("127.0.0.1", 0, health_check)
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client
    server.stop()


def test_metrics_can_be_scraped(http: httpx.Client) -> None:
    """GET /metrics returns the metrics of the process in the Prometheus text format."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"palimpsest_engine_steps", "palimpsest_batch_size", "process_resident_memory_bytes"} <= names


def test_health_is_that_of_the_loop(http: httpx.Client, health_check: FakeHealthCheck) -> None:
    """GET /healthz is 200 while the worker serves, and 503 with the reason while it does not."""
    assert (http.get("/healthz").status_code, http.get("/healthz").text) == (200, "alive\n")
    health_check.problem = "the loop is down"
    assert (http.get("/healthz").status_code, http.get("/healthz").text) == (503, "the loop is down\n")
    health_check.problem = None
    assert http.get("/healthz").status_code == 200


def test_nothing_else_is_there(http: httpx.Client) -> None:
    """Other paths return 404, and other methods 405."""
    assert http.get("/").status_code == 404
    assert http.post("/metrics").status_code == 405


def test_silent_client_does_not_block_the_server(health_check: FakeHealthCheck) -> None:
    """A client that connects and sends nothing delays neither other clients nor the shutdown."""
    server = HealthServer("127.0.0.1", 0, health_check)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port)):
        assert httpx.get(f"http://127.0.0.1:{server.port}/healthz").status_code == 200
        server.stop()


def test_silent_connections_are_few_and_end(
    health_check: FakeHealthCheck, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many silent connections only the newest are kept, each with one thread; a client that sends one byte after
    the other loses its connection, too."""
    address = (http.base_url.host, http.base_url.port)
    silent = [socket.create_connection(address, timeout=30) for _ in range(3 * MAX_CONNECTIONS)]
    assert http.get("/healthz").status_code == 200
    assert [connection.recv(1) for connection in silent[:-MAX_CONNECTIONS]] == [b""] * 2 * MAX_CONNECTIONS
    monkeypatch.setattr(health_server, "CONNECTION_TIMEOUT", 0.3)
    for connection in silent[-2:]:
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1) == b"":
                        break
    for connection in silent:
        connection.close()


def test_too_many_open_files_do_not_make_the_server_spin(
    health_check: FakeHealthCheck, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While connections cannot be accepted, the server waits between attempts, and serves afterwards."""
    attempts = []

    def fail(server: object) -> None:
        attempts.append(server)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(WSGIServer, "get_request", fail)
        patch.setattr(health_server, "ACCEPT_PAUSE", 0.05)
        with socket.create_connection((http.base_url.host, http.base_url.port)):
            time.sleep(0.5)
    assert 0 < len(attempts) <= 11
    assert http.get("/healthz").status_code == 200


def test_port_in_use_is_misconfigured(health_check: FakeHealthCheck) -> None:
    """A port in use raises Misconfigured with a message that names the flag."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Misconfigured, match=f"127.0.0.1:{port}.*--metrics-port"):
            HealthServer("127.0.0.1", port, health_check)


def test_stopping_without_a_start_closes_the_port(health_check: FakeHealthCheck) -> None:
    """Stopping a server that was not started frees its port."""
    server = HealthServer("127.0.0.1", 0, health_check)
    server.stop()
    again = HealthServer("127.0.0.1", server.port, health_check)
    again.stop()
