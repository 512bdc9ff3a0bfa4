"""HTTP requests of the client: retries, errors, paging, and event streams that resume after a lost connection."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import IO, Any, Protocol, TypeVar
from uuid import uuid4

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from palimpsest.errors import PalimpsestError, ServerError, Unreachable, error_from_problem
from palimpsest.resources import Resource

R = TypeVar("R", bound=Resource)
RETRYABLE_STATUSES = (429, 502, 503, 504)
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 8.0  #: seconds before the first retry, and at most before any later one
MAX_RETRY_AFTER = 60.0  #: seconds; a longer `Retry-After` is raised to the caller
OCTET_STREAM = "application/octet-stream"
TERMINAL_EVENTS = ("end", "error")  #: the last event of a stream
PAGE_SIZE = 200  #: items; the service's maximum


def drop_none(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not None; the service applies its defaults to the others."""
    return {name: value for name, value in fields.items() if value is not None}


def backoff_seconds(attempt: int) -> float:
    """Return the seconds before a retry: exponential in the attempt, with 25 % jitter."""
    return min(INITIAL_BACKOFF * 2.0**attempt, MAX_BACKOFF) * random.uniform(0.75, 1.25)


class HttpBackend(Protocol):
    """The operations of httpx that differ between its blocking and its async client."""

    @property
    def build_request(self) -> Callable[..., httpx.Request]: ...
    async def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response: ...
    async def read(self, response: httpx.Response) -> None: ...
    async def close(self, response: httpx.Response) -> None: ...
    def iter_bytes(self, response: httpx.Response) -> AsyncGenerator[bytes, None]: ...
    def iter_events(self, response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]: ...
    async def sleep(self, seconds: float) -> None: ...


class BlockingBackend:
    """`httpx.Client`. Its coroutines block and never suspend."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.build_request: Callable[..., httpx.Request] = http.build_request

    async def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        return self._http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def iter_bytes(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        for chunk in response.iter_bytes():
            yield chunk

    async def iter_events(self, response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
        for event in EventSource(response).iter_sse():
            yield event

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 (no event loop runs here)


class AsyncBackend:
    """`httpx.AsyncClient`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.build_request: Callable[..., httpx.Request] = http.build_request

    async def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        return await self._http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def iter_bytes(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        async for chunk in response.aiter_bytes():
            yield chunk

    async def iter_events(self, response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
        async with aclosing(EventSource(response).aiter_sse()) as events:
            async for event in events:
                yield event

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Transport:
    """Sends requests to one service. `retries` is the maximum number of retries of a request."""

    def __init__(self, backend: HttpBackend, url: str, retries: int, stream_timeout: float) -> None:
        self._backend = backend
        self._url = url
        self._retries = retries
        self._stream_timeout = stream_timeout
        self._has_connected = False  # a wrong address fails at once instead of after all retries

    async def get(self, path: str, *, wait: float = 0, **params: Any) -> Any:
        """Return the JSON of a resource. The service delays its response up to `wait` seconds while a job is
        unfinished."""
        return self._parse_json(
            await self._send("GET", path, params=drop_none(**params), headers=_prefer_header(wait))
        )

    async def download(self, path: str, media_type: str = "*/*") -> bytes:
        """Return a file."""
        return (await self._send("GET", path, headers={"Accept": media_type})).content

    async def download_to(self, file: IO[bytes], path: str, **params: Any) -> str:
        """Write a file in chunks, and return the name that the service gives it."""
        async with self._stream("GET", path, params=drop_none(**params)) as response:
            try:
                async with aclosing(self._backend.iter_bytes(response)) as chunks:
                    async for chunk in chunks:
                        file.write(chunk)
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
        _, _, name = response.headers.get("content-disposition", "").partition('filename="')
        return str(name.partition('"')[0])

    async def iter_items(
        self, path: str, item_type: type[R], limit: int | None = None, /, **params: Any
    ) -> AsyncIterator[R]:
        """Yield the items of a list, page by page; at most `limit`."""
        cursor, remaining = None, limit
        while remaining is None or remaining > 0:
            page_size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
            page = await self.get(path, limit=page_size, cursor=cursor, **params)
            for item in page["items"][:remaining]:
                yield item_type.from_json(item)
            remaining = None if remaining is None else remaining - len(page["items"])
            cursor = page.get("next")
            if not cursor:
                return

    async def post_query(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST that has no further effect when it is repeated, and therefore can be retried."""
        return self._parse_json(await self._send("POST", path, json=body))

    async def put(self, path: str, body: Mapping[str, Any]) -> Any:
        """PUT a resource, and return it."""
        return self._parse_json(await self._send("PUT", path, json=body))

    async def create(self, path: str, body: Mapping[str, Any] | bytes, key: str | None, wait: float) -> Any:
        """POST that creates a resource. The idempotency key makes a retry return the resource of the first attempt."""
        headers = {"Idempotency-Key": key or uuid4().hex, **_prefer_header(wait)}
        if isinstance(body, bytes):
            response = await self._send(
                "POST", path, content=body, headers={**headers, "Content-Type": OCTET_STREAM}
            )
        else:
            response = await self._send("POST", path, json=body, headers=headers)
        return self._parse_json(response)

    async def post_once(self, path: str) -> Any:
        """POST without a body that is never retried."""
        return self._parse_json(await self._send("POST", path, idempotent=False, json={}))

    async def delete(self, path: str, wait: float = 0) -> Any:
        """DELETE a resource, and return its new state."""
        return self._parse_json(await self._send("DELETE", path, headers=_prefer_header(wait)))

    async def stream_events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the events that answer a POST. A stream that breaks off raises: its tokens were already consumed."""
        try:
            async with (
                self._stream("POST", path, json=body, timeout=self._stream_timeout) as response,
                aclosing(self._events(response)) as events,
            ):
                async for event in events:
                    yield event
                    if event.event in TERMINAL_EVENTS:
                        return
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        raise Unreachable(
            f"the service at {self._url} closed the stream before its end: repeat the request.",
            code="stream_interrupted",
        )

    async def follow_events(self, path: str) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the events of a job up to its end; after a lost connection resume behind the last event received."""
        last_event_id, attempt = "", 0
        last_error: Exception = httpx.ReadError("the stream ended before the job did")
        while attempt <= self._retries:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            try:
                async with (
                    self._stream("GET", path, headers=headers, timeout=self._stream_timeout) as response,
                    aclosing(self._events(response)) as events,
                ):
                    async for event in events:
                        last_event_id, attempt = event.id or last_event_id, 0
                        yield event
                        if event.event in TERMINAL_EVENTS:
                            return
            except httpx.TransportError as error:
                last_error = error
            await self._backend.sleep(backoff_seconds(attempt))
            attempt += 1
        raise self._unreachable(last_error)

    async def _events(self, response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield the events of a response; httpx-sse also yields pings, which have no data."""
        try:
            async with aclosing(self._backend.iter_events(response)) as events:
                async for event in events:
                    if event.data:
                        yield event
        except SSEError:
            raise self._unexpected_response(response) from None

    @asynccontextmanager
    async def _stream(self, method: str, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        """A successful response whose body is not read yet."""
        response = await self._send(method, path, stream=True, **options)
        try:
            yield response
        finally:
            await self._backend.close(response)

    async def _send(
        self, method: str, path: str, *, idempotent: bool = True, stream: bool = False, **options: Any
    ) -> httpx.Response:
        """Return a successful response. Retry what may succeed later; raise every other problem."""
        for attempt in range(self._retries + 1):
            may_retry = idempotent and attempt < self._retries
            delay = backoff_seconds(attempt)
            try:
                response = await self._backend.send(
                    self._backend.build_request(method, path, **options), stream=stream
                )
                if stream and response.is_error:
                    await self._backend.read(response)
            except httpx.TransportError as error:
                is_down = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                timed_out = isinstance(error, httpx.ReadTimeout)
                if timed_out or not may_retry or (is_down and not self._has_connected):
                    raise self._unreachable(error) from error
            else:
                self._has_connected = True
                if not response.is_error:
                    return response
                problem = _problem_error(response)
                delay = max(delay, problem.retry_after or 0.0)
                if response.status_code not in RETRYABLE_STATUSES or not may_retry or delay > MAX_RETRY_AFTER:
                    raise problem
            await self._backend.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _parse_json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise self._unexpected_response(response) from None

    def _unexpected_response(self, response: httpx.Response) -> ServerError:
        return ServerError(
            f"{self._url} sent an unexpected response: is this the address of a Palimpsest service?",
            code="unexpected_response",
            status=response.status_code,
        )

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, httpx.ReadTimeout):
            return Unreachable(
                f"{self._url} sent nothing within the timeout: give the client a longer `timeout`, or check the service.",
                code="timeout",
            )
        return Unreachable(
            f"no service answers at {self._url} ({str(error) or type(error).__name__}). Start one with `palimpsest serve`, or "
            "set its address: PALIMPSEST_URL, --url, or Client(url).",
            code="unreachable",
        )


def _retry_after(response: httpx.Response) -> float | None:
    """Return the `Retry-After` of a response in seconds."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def _prefer_header(wait: float) -> dict[str, str]:
    """RFC 7240: ask the service to respond when the job ends or after `wait` seconds."""
    return {"Prefer": f"wait={int(wait)}"} if wait >= 1 else {}


def _problem_error(response: httpx.Response) -> PalimpsestError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    return error_from_problem(
        response.status_code,
        problem if isinstance(problem, dict) else {},
        _retry_after(response),
        response.headers.get("x-request-id"),
    )
