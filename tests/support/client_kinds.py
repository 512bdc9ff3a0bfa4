"""Both clients with the calls of `Client`, so that one test covers `AsyncClient` as well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx

from palimpsest import AsyncClient, Client

CLIENT_KINDS = ["sync", "async"]


class BlockingAdapter:
    """An `AsyncClient` with blocking calls. Iterators are read to the end before they return items."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            return self._runner.run(_collect(found) if isinstance(found, AsyncIterator) else found)

        return call

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


async def _collect(items: AsyncIterator[Any]) -> Any:
    return iter([item async for item in items])


def make_client(kind: str, url: str, transport: Any = None, **more: Any) -> Any:
    """Return a client of one kind; `transport` must support that kind."""
    if kind == "sync":
        return Client(url, transport=transport, **more)
    return BlockingAdapter(AsyncClient(url, transport=transport, **more))


class LossyTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Sends requests and drops the responses to the first ones of a method."""

    def __init__(self, method: str, times: int = 1) -> None:
        self._transport = httpx.HTTPTransport()
        self._async_transport = httpx.AsyncHTTPTransport()
        self.method, self.left = method, times

    def _drop_response(self, request: httpx.Request) -> None:
        if request.method == self.method and self.left:
            self.left -= 1
            raise httpx.ReadError("the answer was lost")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._transport.handle_request(request)
        if request.method == self.method and self.left:
            answer.read()
            answer.close()
            self._drop_response(request)
        return answer

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._async_transport.handle_async_request(request)
        if request.method == self.method and self.left:
            await answer.aread()
            await answer.aclose()
            self._drop_response(request)
        return answer

    def close(self) -> None:
        self._transport.close()

    async def aclose(self) -> None:
        await self._async_transport.aclose()
