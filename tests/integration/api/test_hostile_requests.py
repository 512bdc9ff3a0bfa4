"""Requests that are not valid HTTP, or have too much of something, get a status of 4xx before they cost anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cli.http_protocol import MAX_HEADER_LINES
from tests.support.limited_server import ROOT_KEY, LimitedServer, connections, read_to_end

HOST = b"Host: x\r\nConnection: close\r\n"
KEY = f"Authorization: Bearer {ROOT_KEY}\r\n".encode()
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"POST /edits HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n"
MAX_RESPONSE = 2000  #: bytes

#: name -> the bytes of a request, and the statuses that it may get
REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "long URL": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {414}),
    "endless URL": (b"GET /" + b"a" * 1_000_000, {414}),
    "long query": (b"GET /edits?" + b"&a=" * 4000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {414}),
    "many parameters": (b"GET /edits?" + b"limit=x&" * 900 + b" HTTP/1.1\r\n" + HOST + KEY + b"\r\n", {422}),
    "long method": (b"X" * 1000 + b" /edits HTTP/1.1\r\n" + HOST + b"\r\n", {405}),
    "many headers": (b"GET /edits HTTP/1.1\r\n" + HOST + b"a:\r\n" * 3000 + b"\r\n", {431}),
    "endless headers": (b"GET /edits HTTP/1.1\r\n" + HOST + b"a:\r\n" * 200_000, {431}),
    "large header": (b"GET /edits HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", {431}),
    "endless header": (b"GET /edits HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 1_000_000, {431}),
    "empty lines": (b"\r\n" * 20_000, {400, 431}),
    "no host": (b"GET /edits HTTP/1.1\r\n\r\n", {400}),
    "two hosts": (b"GET /edits HTTP/1.1\r\nHost: y\r\n" + HOST + b"\r\n", {400}),
    "no version": (b"GET /edits\r\n\r\n", {400}),
    "NUL in a header": (b"GET /edits HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n", {400}),
    "space in a name": (b"GET /edits HTTP/1.1\r\n" + HOST + b"X : a\r\n\r\n", {400}),
    "URL that is not ASCII": ("GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n", {400}),
    "NUL in a path": (b"GET /edits/%00%ff HTTP/1.1\r\n" + HOST + KEY + b"\r\n", {404}),
    "URL of another server": (b"GET http://other/edits HTTP/1.1\r\n" + HOST + KEY + b"\r\n", {404}),
    "CONNECT": (b"CONNECT other:443 HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    "OPTIONS of the server": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    "two lengths": (b"POST /edits HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", {400}),
    "negative length": (b"POST /edits HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n{}", {400}),
    "length of many digits": (b"POST /edits HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", {400}),
    "huge length": (b"POST /edits HTTP/1.1\r\n" + HOST + KEY + JSON + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n{", {413}),
    "unknown coding": (b"POST /edits HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n{}", {400}),
    "chunk that is no number": (CHUNKED + KEY + b"\r\nx\r\n", {400}),
    "chunk with a long extension": (CHUNKED + KEY + b"\r\n1;" + b"a" * 40_000 + b"\r\n", {400, 431}),
    "endless trailer": (CHUNKED + KEY + b"\r\n2\r\n{}\r\n0\r\n" + b"a:b\r\n" * 20_000, {400, 422, 431}),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedServer]:
    limits = {"header": 1.0, "body": 1.0, "unread_pause": 0.3}
    running = LimitedServer(tmp_path_factory.mktemp("server"), limits)
    yield running
    running.stop()
    assert "Traceback" not in running.log()
    assert len(running.log()) < 2000


def exchange(server: LimitedServer, sent: bytes, then: bytes = b"") -> bytes:
    """Send bytes, and others after the first part of the response; return what the server sends until it closes."""
    with connections(server.address, 1) as (client,):
        first = b""
        try:
            client.sendall(sent)
            if then:
                first = client.recv(65536)
                client.sendall(then)
        except OSError:  # it was refused before its end
            pass
        return first + read_to_end(client)


def status_of(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_requests_are_refused(server: LimitedServer, name: str) -> None:
    """A request that is not valid, or has too much of something, gets a short response with a status of 4xx, and the
    connection is closed."""
    sent, statuses = REQUESTS[name]
    response = exchange(server, sent)
    assert status_of(response) in statuses, response
    assert len(response) < MAX_RESPONSE
    assert server.get("/healthz").status_code == 200


@pytest.mark.parametrize("method", ["HEAD", "TRACE", "OPTIONS", "PATCH", "PUT", "PROPFIND", "get", "X"])
@pytest.mark.parametrize(("path", "status"), [("/edits", 405), ("/generate", 405), ("/nothing", 404)])
def test_other_methods_are_refused(server: LimitedServer, method: str, path: str, status: int) -> None:
    """A method that a path does not have gets 405, with the methods that it has, and an unknown path 404. Nothing of
    the request is repeated, as TRACE would."""
    secret = b"X-Secret: do-not-repeat\r\n"
    response = exchange(server, f"{method} {path} HTTP/1.1\r\n".encode() + HOST + secret + b"\r\n")
    assert status_of(response) == status
    assert (b"\r\nallow: " in response.lower()) == (status == 405)
    assert b"do-not-repeat" not in response


def test_an_error_after_the_response_closes_the_connection(server: LimitedServer) -> None:
    """A body that becomes invalid after the response has been sent ends the connection without another response."""
    response = exchange(server, CHUNKED.replace(b"Connection: close\r\n", b"") + b"\r\n", b"not a chunk\r\n")
    assert status_of(response) == 401
    assert response.count(b"HTTP/1.1") == 1


def test_another_protocol_is_not_offered(server: LimitedServer) -> None:
    """A request that asks for a WebSocket is served as HTTP, and nothing is logged."""
    upgrade = b"Host: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert status_of(exchange(server, b"GET /healthz HTTP/1.1\r\n" + upgrade)) == 200
    assert "WebSocket" not in server.log()


def test_a_header_of_the_largest_size_is_accepted(server: LimitedServer) -> None:
    """A header just below the limits is served, with a body of more lines than a header may have."""
    few = b"a: b\r\n" * (MAX_HEADER_LINES - 8)
    body = b"\n" * 1000 + b"{}"
    head = b"POST /edits HTTP/1.1\r\n" + HOST + KEY + JSON + few + b"Content-Length: %d\r\n\r\n" % len(body)
    assert status_of(exchange(server, head + body)) == 422
    assert (
        status_of(exchange(server, b"GET /healthz?" + b"a" * 8000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")) == 200
    )
