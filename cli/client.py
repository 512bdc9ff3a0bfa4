"""The service as its client sees it: JSON over HTTP, problems as exceptions, event streams that survive a lost connection."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from httpx_sse import EventSource
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from palimpsest.client import is_loopback
from service.errors import Misconfigured, PalimpsestError, Unavailable

OCTET_STREAM = "application/octet-stream"
_FILENAME = re.compile(r'filename="([\w.-]+)"', re.ASCII)
MAX_RECONNECTS = 5  # in a row, without an event between them


class Event(NamedTuple):
    """A server-sent event."""

    id: str
    name: str
    data: Any


def _iter_events(response: httpx.Response) -> Iterator[Event]:
    for event in EventSource(response).iter_sse():
        if event.data:
            yield Event(event.id, event.event, event.json())


class ClientSettings(BaseSettings):
    """Where the service is. `docs/settings.md` lists every field."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    url: str = Field("http://127.0.0.1:8000", description="address of the service")
    api_key: str | None = Field(None, description="bearer key of the service, when it asks for one")


class ProblemResponse(PalimpsestError):
    """The service answered with a problem."""

    code = "problem_response"
    title = "The service refused"


def _problem_message(problem: Mapping[str, Any], status: int) -> str:
    """What a problem document says, for a person."""
    detail = problem.get("detail") or problem.get("title") or f"the service answered {status}."
    field_details = [
        str(e.get("detail") or e.get("msg") or "") for e in problem.get("errors") or () if isinstance(e, dict)
    ]
    return "\n".join(
        [str(detail), *(f"  {text}" for text in field_details if text and text not in str(detail))]
    )


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    raise ProblemResponse(_problem_message(problem, response.status_code), status=response.status_code)


class Client:
    """Calls to one service."""

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None = None) -> None:
        self.url = settings.url.rstrip("/")
        parsed_url = urlsplit(self.url)
        if parsed_url.scheme not in ("http", "https") or not parsed_url.hostname:
            raise Misconfigured(f"--url cannot be {settings.url!r}: write it as http://127.0.0.1:8000.")
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(60.0, read=None),  # an answer takes as long as the model takes
            trust_env=not is_loopback(parsed_url.hostname),  # a proxy never stands before one's own machine
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        query = {name: value for name, value in params.items() if value is not None}
        return self._request("GET", path, params=query).json()

    def iter_items(self, path: str, **params: Any) -> Iterator[Any]:
        """The items of a list, page after page."""
        cursor = None
        while True:
            page = self.get(path, cursor=cursor, **params)
            yield from page["items"]
            cursor = page.get("next")
            if not cursor:
                return

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, json=body).json()

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path).json()

    def picture(self, path: str, media_type: str) -> bytes:
        return self._request("GET", path, headers={"Accept": media_type}).content

    def download(self, path: str, file: IO[bytes], **params: Any) -> str:
        """Write what the service sends to a file, piece by piece; the name that the service gives it."""
        with self._translate_transport_errors(), self._http.stream("GET", path, params=params) as response:
            _raise_for_status(response)
            for chunk in response.iter_bytes():
                file.write(chunk)
        match = _FILENAME.search(response.headers.get("content-disposition", ""))
        return match[1] if match else ""

    def upload(self, path: str, data: bytes) -> Any:
        """A file to the service."""
        return self._request("POST", path, content=data, headers={"Content-Type": OCTET_STREAM}).json()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        """The events that answer a POST."""
        with self._translate_transport_errors(), self._http.stream("POST", path, json=body) as response:
            _raise_for_status(response)
            yield from _iter_events(response)

    def follow_events(self, path: str, retry_delay: float = 0.5) -> Iterator[Event]:
        """The events of a job up to its end, taken up again where they were when the connection is lost."""
        last_event_id, failures = "", 0
        while True:
            try:
                headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
                with self._http.stream("GET", path, headers=headers) as response:
                    _raise_for_status(response)
                    for event in _iter_events(response):
                        last_event_id, failures = event.id or last_event_id, 0
                        yield event
                        if event.name in ("end", "error"):
                            return
            except httpx.TransportError as error:
                if failures >= MAX_RECONNECTS:
                    raise self._unreachable() from error
            failures += 1
            if failures > MAX_RECONNECTS:
                raise self._unreachable()
            time.sleep(retry_delay)

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._translate_transport_errors():
            response = self._http.request(method, path, **options)
        _raise_for_status(response)
        return response

    @contextmanager
    def _translate_transport_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise self._unreachable() from error

    def _unreachable(self) -> Unavailable:
        return Unavailable(
            f"no service answers at {self.url}. Start one with `palimpsest serve`, or say where it is with "
            "--url or PALIMPSEST_URL."
        )
