"""The two clients: where the service is, and how a step of a call is taken with httpx."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Self, TypedDict
from urllib.parse import urlsplit

import httpx

from palimpsest.endpoints import MAX_PREFER_WAIT, Endpoints, J, OnProgress
from palimpsest.flow import ConnectionLost, Request, Response
from palimpsest.sync_async import AsyncRunner, SyncRunner
from palimpsest.transport import Transport

DEFAULT_URL = "http://127.0.0.1:8000"
STREAM_TIMEOUT = 60.0  #: seconds; a stream pings every 15, so that one which says nothing for so long is dead


class _HttpOptions(TypedDict):
    base_url: str
    headers: Mapping[str, str]
    timeout: httpx.Timeout
    trust_env: bool


class _BaseClient(Endpoints):
    """Where a service is, and how patient the client is with it."""

    def __init__(self, url: str | None, key: str | None, timeout: float, retries: int) -> None:
        url = (url or os.environ.get("PALIMPSEST_URL") or DEFAULT_URL).rstrip("/")
        key = key or os.environ.get("PALIMPSEST_API_KEY")
        parsed_url = urlsplit(url)
        if parsed_url.scheme not in ("http", "https") or not parsed_url.hostname:
            raise ValueError(f"{url!r} is no address of a service: write it as {DEFAULT_URL}.")
        self.url = url
        self._transport = Transport(url, retries)
        self._prefer_wait = min(MAX_PREFER_WAIT, timeout / 2)
        self._stream_timeout = min(STREAM_TIMEOUT, timeout)
        self._http_options = _HttpOptions(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=not is_loopback(parsed_url.hostname),  # a proxy never stands before one's own machine
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class Client(_BaseClient, SyncRunner):
    """A Palimpsest service.

    `url` and `key` are PALIMPSEST_URL and PALIMPSEST_API_KEY where they are left out, and a service on this machine without a key
    where those are not set. `timeout`: seconds without a word after which an answer is given up. `retries`: how often a request is
    sent again when its answer is lost or the service says to come back; nothing is ever done twice by that. An address that has not
    answered yet is not tried again. A client may be shared by threads.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = httpx.Client(**self._http_options, transport=transport)

    def wait_for(self, job: J, *, on_progress: OnProgress | None = None) -> J:
        """The job when it has ended, whatever became of it. `on_progress` hears how far it is, also after a lost connection."""
        return self._run(self._wait_for(job, on_progress))

    def cancel(self, job: J, *, wait: bool = True) -> J:
        """End a job that waits or runs. Saying it twice is harmless."""
        return self._run(self._cancel(job, wait))

    def close(self) -> None:
        """Let go of all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _io_backend(self) -> _HttpxBackend:
        return _HttpxBackend(self._http, self._stream_timeout)


class AsyncClient(_BaseClient, AsyncRunner):
    """The same service for asyncio: every call of `Client` is awaited, and what is iterated over is so with `async for`."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = httpx.AsyncClient(**self._http_options, transport=transport)

    async def wait_for(self, job: J, *, on_progress: OnProgress | None = None) -> J:
        """The job when it has ended, whatever became of it. `on_progress` hears how far it is, also after a lost connection."""
        return await self._run(self._wait_for(job, on_progress))

    async def cancel(self, job: J, *, wait: bool = True) -> J:
        """End a job that waits or runs. Saying it twice is harmless."""
        return await self._run(self._cancel(job, wait))

    async def aclose(self) -> None:
        """Let go of all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _io_backend(self) -> _AsyncHttpxBackend:
        return _AsyncHttpxBackend(self._http, self._stream_timeout)


class _HttpxBackend:
    """Steps taken with httpx; at most one answer is being streamed."""

    def __init__(self, http: httpx.Client, stream_timeout: float) -> None:
        self._http = http
        self._stream_timeout = stream_timeout
        self._response: httpx.Response | None = None
        self._lines: Iterator[str] = iter(())

    def send(self, request: Request) -> Response:
        self.close()
        with _translate_transport_errors():
            response = self._http.send(
                _build_request(self._http.build_request, request, self._stream_timeout),
                stream=request.streamed,
            )
            if not request.streamed or response.is_error:
                response.read()
                return _to_response(response, response.content)
        self._response, self._lines = response, response.iter_lines()
        return _to_response(response)

    def read_line(self) -> str | None:
        with _translate_transport_errors():
            return next(self._lines, None)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()


class _AsyncHttpxBackend:
    """The same, awaited."""

    def __init__(self, http: httpx.AsyncClient, stream_timeout: float) -> None:
        self._http = http
        self._stream_timeout = stream_timeout
        self._response: httpx.Response | None = None
        self._lines: AsyncIterator[str]

    async def send(self, request: Request) -> Response:
        await self.close()
        with _translate_transport_errors():
            response = await self._http.send(
                _build_request(self._http.build_request, request, self._stream_timeout),
                stream=request.streamed,
            )
            if not request.streamed or response.is_error:
                await response.aread()
                return _to_response(response, response.content)
        self._response, self._lines = response, response.aiter_lines()
        return _to_response(response)

    async def read_line(self) -> str | None:
        with _translate_transport_errors():
            return await anext(self._lines, None)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            await response.aclose()


def _build_request(
    build: Callable[..., httpx.Request], request: Request, stream_timeout: float
) -> httpx.Request:
    options: dict[str, Any] = {} if request.body is None else {"json": request.body}
    if request.content is not None:
        options["content"] = request.content
    if request.streamed:
        options["timeout"] = stream_timeout
    return build(request.method, request.path, params=request.params, headers=request.headers, **options)


def _to_response(response: httpx.Response, content: bytes = b"") -> Response:
    return Response(response.status_code, {k.lower(): v for k, v in response.headers.items()}, content)


@contextmanager
def _translate_transport_errors() -> Iterator[None]:
    """What httpx says of a lost connection, in the words of a call."""
    try:
        yield
    except httpx.ReadTimeout:
        raise ConnectionLost("said nothing for too long", timed_out=True) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionLost(str(error) or "it took too long to connect", never_connected=True) from error
    except httpx.TransportError as error:
        raise ConnectionLost(str(error) or type(error).__name__) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
