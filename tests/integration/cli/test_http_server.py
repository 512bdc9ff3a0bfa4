"""Connections to a server process that may open few files: cli.http_server and the modules below it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from cli.http_connections import EXTRA_CONNECTIONS
from tests.support.application import TOWER
from tests.support.limited_server import (
    AUTHORIZATION,
    OPEN_FILES,
    ROOT_KEY,
    LimitedServer,
    connections,
    read_to_end,
)
from tests.support.local_server import wait_until

LIMITS = {
    "header": 1.0,
    "body": 1.0,
    "body_rate": 10.0,
    "unread_pause": 0.5,
    "unread_body": 2.5,
    "write": 1.0,
    "keep_alive": 5.0,
}
LONG = 3.0  #: seconds, longer than each limit but `keep_alive`
KEY = f"Authorization: Bearer {ROOT_KEY}\r\n".encode()
POST = b"POST /edits HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MAX_LOG = 10_000  #: bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedServer]:
    """Run a server with short time limits, and the number of connections that its open files allow."""
    running = LimitedServer(tmp_path_factory.mktemp("server"), LIMITS)
    yield running
    running.stop()
    assert "Traceback" not in running.log()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., LimitedServer]]:
    """Return a function that starts a server; it is stopped at the end."""
    with ExitStack() as stack:

        def start(max_connections: int, **limits: float) -> LimitedServer:
            running = LimitedServer(tmp_path, limits, max_connections)
            stack.callback(running.stop)
            return running

        yield start


def closed_count(server: LimitedServer, reason: str) -> float:
    return server.metric("http_connections_closed_total", reason=reason)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /edits HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a header"]
)
def test_silent_connections_keep_nobody_out(server: LimitedServer, sent: bytes) -> None:
    """While as many connections as the process may have files send nothing, other clients are answered. Each
    silent connection is closed, and hardly anything is logged."""
    with connections(server.address, OPEN_FILES, sent) as silent:
        assert server.get("/readyz").status_code == 200
        assert server.get("/edits").status_code == 200
        assert server.open_files() < OPEN_FILES
        for connection in silent:
            assert read_to_end(connection)[:12] in (b"", b"HTTP/1.1 408")
    wait_until(lambda: server.metric("http_connections") == 1)  # that of the scrape
    assert len(server.log()) < MAX_LOG


def test_a_client_with_many_connections_loses_them_first(server: LimitedServer) -> None:
    """At the limit the address with most connections loses them, so that another client has its whole time."""
    with (
        socket.create_connection(server.address, source_address=("127.0.0.2", 0), timeout=30) as patient,
        connections(server.address, OPEN_FILES),
    ):
        assert server.get("/healthz").status_code == 200  # all connections before it have been accepted
        patient.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_to_end(patient).startswith(b"HTTP/1.1 200")


def test_a_slow_header_gets_408(server: LimitedServer) -> None:
    """A header that is sent byte by byte has a limit in total, also after a first request on the connection."""
    for first in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        before = closed_count(server, "header")
        with connections(server.address, 1, first) as (slow,):
            slow.settimeout(0.1)
            received = b""
            for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100:
                try:
                    slow.sendall(bytes([byte]))
                    if not (part := slow.recv(65536)):
                        break
                    received += part
                except TimeoutError:
                    continue
                except OSError:
                    break
            else:
                pytest.fail("the connection was not closed")
        assert b"HTTP/1.1 408" in received
        assert closed_count(server, "header") == before + 1


@pytest.mark.parametrize("body", [b"{", b""])
def test_a_body_that_stops_gets_408(server: LimitedServer, body: bytes) -> None:
    """A request whose body stops is answered with 408 and has no effect."""
    before = closed_count(server, "body")
    with connections(server.address, 1, POST + KEY + b"Content-Length: 100\r\n\r\n" + body) as (slow,):
        assert read_to_end(slow).startswith(b"HTTP/1.1 408")
    assert closed_count(server, "body") == before + 1
    assert server.get("/edits").json()["items"] == []


def test_a_body_below_the_least_rate_gets_408(server: LimitedServer) -> None:
    """A body that never stops, and is slower than the least rate, is closed, too."""
    with connections(server.address, 1, POST + KEY + b"Content-Length: 1000\r\n\r\n") as (slow,):
        slow.settimeout(0.4)
        received = b""
        while not received:
            slow.sendall(b" ")
            try:
                received = slow.recv(65536)
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408")


def test_a_steady_body_has_time(server: LimitedServer) -> None:
    """A body that takes longer than the limit, and is sent steadily, is accepted."""
    raw = json.dumps({"edits": []}).encode() + b" " * 60
    with connections(server.address, 1, POST + KEY + b"Content-Length: %d\r\n\r\n" % len(raw)) as (steady,):
        for start in range(0, len(raw), 10):
            time.sleep(LONG / 7)
            steady.sendall(raw[start : start + 10])
        assert steady.recv(65536).startswith(b"HTTP/1.1 422")


def test_the_body_of_a_refused_request_is_not_awaited(server: LimitedServer) -> None:
    """A request without a key is answered before its body, and its connection is closed when the body is slow."""
    with connections(server.address, 1, POST + b"Content-Length: 100000\r\n\r\n{") as (slow,):
        answer = read_to_end(slow)
    assert answer.startswith(b"HTTP/1.1 401")


def test_a_client_that_sends_the_whole_body_first_reads_the_refusal(server: LimitedServer) -> None:
    """A client that is still sending when its request is refused, for longer than the pause that is allowed, sends the
    rest and reads the status: the connection is not reset while bytes arrive."""
    length = 100
    with connections(server.address, 1, POST + b"Content-Length: %d\r\n\r\n" % length) as (client,):
        for _ in range(10):
            time.sleep(0.15)
            client.sendall(b" " * (length // 10))
        assert client.recv(65536).startswith(b"HTTP/1.1 401")


def test_the_rest_of_a_refused_body_has_a_limit_in_total(server: LimitedServer) -> None:
    """A client that never ends the body of a refused request loses its connection, though it sends steadily."""
    before = closed_count(server, "body")
    with (
        connections(server.address, 1, POST + b"Content-Length: 100000\r\n\r\n") as (endless,),
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        for _ in range(100):
            time.sleep(0.1)
            endless.sendall(b" ")
    assert closed_count(server, "body") == before + 1


def test_an_unread_response_ends_the_connection(server: LimitedServer) -> None:
    """A client that sends requests and reads no response loses its connection when no byte is taken in time."""
    before = closed_count(server, "write")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        wait_until(lambda: closed_count(server, "write") == before + 1)
    wait_until(lambda: server.metric("http_requests_in_progress") == 1)  # that of the scrape


def test_a_silent_stream_is_kept(server: LimitedServer) -> None:
    """A stream of events without an event for longer than each limit is not closed."""
    with httpx.Client(base_url=server.url, headers=AUTHORIZATION, timeout=30) as client:
        server.hold_jobs()
        edit = client.post("/edits", json=TOWER).json()
        with client.stream("GET", edit["links"]["events"]) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": open"
            time.sleep(LONG)
            server.release_jobs()
            assert "event: end" in lines
        client.delete(edit["links"]["self"])


def test_a_connection_is_kept_between_requests(server: LimitedServer) -> None:
    """A connection that has served a request may be idle for longer than the limit of a header."""
    with connections(server.address, 1, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as (kept,):
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(LONG)
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in read_to_end(kept)


@pytest.mark.parametrize(
    "sent", [b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", POST + b"Content-Length: 2\r\n\r\n{"]
)
def test_a_kept_connection_is_closed_at_last(server: LimitedServer, sent: bytes) -> None:
    """A connection is closed some time after a response without another request, also when the body of the first ended
    after its response."""
    with connections(server.address, 1, sent) as (kept,):
        assert kept.recv(65536).startswith(b"HTTP/1.1 ")
        if sent.endswith(b"{"):
            kept.sendall(b"}")
        read_to_end(kept)


def test_above_the_limit_only_probes_are_served(start_server: Callable[..., LimitedServer]) -> None:
    """While all connections are busy, probes are answered, and every other request gets 503 and is closed at once.
    Silent connections change nothing."""
    server = start_server(max_connections=16)
    server.hold_jobs()
    with httpx.Client(base_url=server.url, headers=AUTHORIZATION) as client:
        events = client.post("/edits", json=TOWER).json()["links"]["events"]
    request = f"GET {events} HTTP/1.1\r\nHost: x\r\n".encode() + KEY + b"\r\n"
    with connections(server.address, 16, request) as streams:
        for stream in streams:
            assert stream.recv(65536).startswith(b"HTTP/1.1 200")
        with connections(server.address, 5 * EXTRA_CONNECTIONS):
            refused = server.get("/edits")
            assert refused.status_code == 503
            assert refused.headers["connection"] == "close"
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["code"] == "unavailable"
            assert server.get("/readyz").status_code == 200
            assert server.metric("http_rejected_total", limit="connections") == 1
    wait_until(lambda: server.get("/edits").status_code == 200)
    server.release_jobs()


def test_too_many_open_files_are_survived(start_server: Callable[..., LimitedServer]) -> None:
    """With a limit of connections above that of files, accepting fails, which is logged once a minute; clients are
    answered nevertheless."""
    server = start_server(max_connections=10 * OPEN_FILES, header=60.0)
    with connections(server.address, 2 * OPEN_FILES):
        assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
        assert server.log().count("connections are not accepted") == 1
    assert len(server.log()) < MAX_LOG


def test_malformed_requests_are_logged_once(server: LimitedServer) -> None:
    """Requests that are not HTTP get 400, and do not fill the log."""
    for _ in range(20):
        with connections(server.address, 1, b"\x16\x03\x01 not HTTP\r\n\r\n") as (client,):
            assert read_to_end(client).startswith(b"HTTP/1.1 400")
    assert server.log().count("Invalid HTTP request") <= 1
