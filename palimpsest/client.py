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

from palimpsest.endpoints import WAIT, Calls, J, OnProgress
from palimpsest.flow import Answer, Lost, Send
from palimpsest.sync_async import Awaiting, Blocking
from palimpsest.transport import Door

HERE = "http://127.0.0.1:8000"
SILENCE = 60.0  #: seconds; a stream pings every 15, so that one which says nothing for so long is dead


class _Connection(TypedDict):
    base_url: str
    headers: Mapping[str, str]
    timeout: httpx.Timeout
    trust_env: bool


class _Service(Calls):
    """Where a service is, and how patient the client is with it."""

    def __init__(self, url: str | None, key: str | None, timeout: float, retries: int) -> None:
        url = (url or os.environ.get("PALIMPSEST_URL") or HERE).rstrip("/")
        key = key or os.environ.get("PALIMPSEST_API_KEY")
        where = urlsplit(url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise ValueError(f"{url!r} is no address of a service: write it as {HERE}.")
        self.url = url
        self._door = Door(url, retries)
        self._wait = min(WAIT, timeout / 2)
        self._silence = min(SILENCE, timeout)
        self._connection = _Connection(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=not is_loopback(where.hostname),  # a proxy never stands before one's own machine
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class Client(_Service, Blocking):
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
        self._http = httpx.Client(**self._connection, transport=transport)

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

    def _hands(self) -> _Hands:
        return _Hands(self._http, self._silence)


class AsyncClient(_Service, Awaiting):
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
        self._http = httpx.AsyncClient(**self._connection, transport=transport)

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

    def _hands(self) -> _AsyncHands:
        return _AsyncHands(self._http, self._silence)


class _Hands:
    """Steps taken with httpx; at most one answer is being streamed."""

    def __init__(self, http: httpx.Client, silence: float) -> None:
        self._http = http
        self._silence = silence
        self._streamed: httpx.Response | None = None
        self._lines: Iterator[str] = iter(())

    def send(self, send: Send) -> Answer:
        self.close()
        with _losses():
            response = self._http.send(
                _request(self._http.build_request, send, self._silence), stream=send.streamed
            )
            if not send.streamed or response.is_error:
                response.read()
                return _answer(response, response.content)
        self._streamed, self._lines = response, response.iter_lines()
        return _answer(response)

    def line(self) -> str | None:
        with _losses():
            return next(self._lines, None)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        streamed, self._streamed = self._streamed, None
        if streamed is not None:
            streamed.close()


class _AsyncHands:
    """The same, awaited."""

    def __init__(self, http: httpx.AsyncClient, silence: float) -> None:
        self._http = http
        self._silence = silence
        self._streamed: httpx.Response | None = None
        self._lines: AsyncIterator[str]

    async def send(self, send: Send) -> Answer:
        await self.close()
        with _losses():
            response = await self._http.send(
                _request(self._http.build_request, send, self._silence), stream=send.streamed
            )
            if not send.streamed or response.is_error:
                await response.aread()
                return _answer(response, response.content)
        self._streamed, self._lines = response, response.aiter_lines()
        return _answer(response)

    async def line(self) -> str | None:
        with _losses():
            return await anext(self._lines, None)

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        streamed, self._streamed = self._streamed, None
        if streamed is not None:
            await streamed.aclose()


def _request(build: Callable[..., httpx.Request], send: Send, silence: float) -> httpx.Request:
    more: dict[str, Any] = {} if send.body is None else {"json": send.body}
    if send.content is not None:
        more["content"] = send.content
    if send.streamed:
        more["timeout"] = silence
    return build(send.method, send.path, params=send.params, headers=send.headers, **more)


def _answer(response: httpx.Response, content: bytes = b"") -> Answer:
    return Answer(response.status_code, {k.lower(): v for k, v in response.headers.items()}, content)


@contextmanager
def _losses() -> Iterator[None]:
    """What httpx says of a lost connection, in the words of a call."""
    try:
        yield
    except httpx.ReadTimeout:
        raise Lost("said nothing for too long", silent=True) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Lost(str(error) or "it took too long to connect", nobody=True) from error
    except httpx.TransportError as error:
        raise Lost(str(error) or type(error).__name__) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
