"""`Client` and `AsyncClient`: address, credentials and timeouts of a service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Self, TypedDict
from urllib.parse import urlsplit

import httpx

from palimpsest.endpoints import MAX_PREFER_WAIT, Endpoints, J, OnProgress
from palimpsest.sync_async import AsyncMode, SyncMode, run_sync
from palimpsest.transport import AsyncBackend, BlockingBackend, HttpBackend, Transport

DEFAULT_URL = "http://127.0.0.1:8000"
STREAM_TIMEOUT = (
    60.0  #: seconds; the service sends a ping every 15, so a longer silence means a dead connection
)


class _HttpOptions(TypedDict):
    base_url: str
    headers: Mapping[str, str]
    timeout: httpx.Timeout
    trust_env: bool


class _BaseClient(Endpoints):
    """Configuration that both clients share."""

    def __init__(self, url: str | None, key: str | None, timeout: float) -> None:
        self.url = (url or os.environ.get("PALIMPSEST_URL") or DEFAULT_URL).rstrip("/")
        key = key or os.environ.get("PALIMPSEST_API_KEY")
        parsed_url = urlsplit(self.url)
        if parsed_url.scheme not in ("http", "https") or not parsed_url.hostname:
            raise ValueError(
                f"{self.url!r} is not the address of a service: use a form such as {DEFAULT_URL}."
            )
        self._timeout = timeout
        self._prefer_wait = min(MAX_PREFER_WAIT, timeout / 2)
        self._http_options = _HttpOptions(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=not is_loopback_host(parsed_url.hostname),  # no proxy for a service on this machine
        )

    def _make_transport(self, backend: HttpBackend, retries: int) -> Transport:
        return Transport(backend, self.url, retries, min(STREAM_TIMEOUT, self._timeout))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class Client(_BaseClient, SyncMode):
    """A client of a Palimpsest service. Threads may share it.

    `url` and `key` default to PALIMPSEST_URL and PALIMPSEST_API_KEY, then to http://127.0.0.1:8000 without a key. `timeout` is the
    maximum time without a byte from the service, in seconds. `retries` is how often a request is repeated after a lost
    connection or a response such as 503; idempotency keys prevent duplicates. An address that never answered is not
    retried.
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
        super().__init__(url, key, timeout)
        self._http = httpx.Client(**self._http_options, transport=transport)
        self._transport = self._make_transport(BlockingBackend(self._http), retries)

    def wait_for(self, job: J, *, on_progress: OnProgress | None = None) -> J:
        """Wait until a job ends, and return its final state. `on_progress` is called with each `Progress`."""
        return run_sync(self._wait_until_finished(job, on_progress))

    def cancel(self, job: J, *, wait: bool = True) -> J:
        """Cancel a job that is queued or running. Repeating the call has no further effect."""
        return run_sync(self._cancel_or_revert(type(job), job, wait))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_BaseClient, AsyncMode):
    """The client for asyncio: the same calls as `Client`, awaited or iterated over with `async for`."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, key, timeout)
        self._http = httpx.AsyncClient(**self._http_options, transport=transport)
        self._transport = self._make_transport(AsyncBackend(self._http), retries)

    async def wait_for(self, job: J, *, on_progress: OnProgress | None = None) -> J:
        """Wait until a job ends, and return its final state. `on_progress` is called with each `Progress`."""
        return await self._wait_until_finished(job, on_progress)

    async def cancel(self, job: J, *, wait: bool = True) -> J:
        """Cancel a job that is queued or running. Repeating the call has no further effect."""
        return await self._cancel_or_revert(type(job), job, wait)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def is_loopback_host(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
