"""The service as its client sees it: JSON over HTTP, problems as exceptions, event streams that survive a lost connection."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from palimpsest.client import is_loopback
from palimpsest.sse import Event, parse_events
from service.errors import Misconfigured, PalimpsestError, Unavailable

BINARY = "application/octet-stream"
_NAME = re.compile(r'filename="([\w.-]+)"', re.ASCII)
RECONNECTS = 5  # in a row, without an event between them


class ClientSettings(BaseSettings):
    """Where the service is. `docs/settings.md` lists every field."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    url: str = Field("http://127.0.0.1:8000", description="address of the service")
    api_key: str | None = Field(None, description="bearer key of the service, when it asks for one")


class Refused(PalimpsestError):
    """The service answered with a problem."""

    title = "The service refused"


def _sentence(problem: Mapping[str, Any], status: int) -> str:
    """What a problem document says, for a person."""
    detail = problem.get("detail") or problem.get("title") or f"the service answered {status}."
    more = [
        str(e.get("detail") or e.get("msg") or "") for e in problem.get("errors") or () if isinstance(e, dict)
    ]
    return "\n".join([str(detail), *(f"  {text}" for text in more if text and text not in str(detail))])


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    raise Refused(_sentence(problem, response.status_code), status=response.status_code)


class Client:
    """Calls to one service."""

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None = None) -> None:
        self.url = settings.url.rstrip("/")
        where = urlsplit(self.url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise Misconfigured(f"--url cannot be {settings.url!r}: write it as http://127.0.0.1:8000.")
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(60.0, read=None),  # an answer takes as long as the model takes
            trust_env=not is_loopback(where.hostname),  # a proxy never stands before one's own machine
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        asked = {name: value for name, value in params.items() if value is not None}
        return self._call("GET", path, params=asked).json()

    def items(self, path: str, **params: Any) -> Iterator[Any]:
        """The items of a list, page after page."""
        cursor = None
        while True:
            page = self.get(path, cursor=cursor, **params)
            yield from page["items"]
            cursor = page.get("next")
            if not cursor:
                return

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, json=body).json()

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path).json()

    def picture(self, path: str, media_type: str) -> bytes:
        return self._call("GET", path, headers={"Accept": media_type}).content

    def file(self, path: str, file: IO[bytes], **params: Any) -> str:
        """Write what the service sends to a file, piece by piece; the name that the service gives it."""
        with self._reached(), self._http.stream("GET", path, params=params) as response:
            _raise_for(response)
            for piece in response.iter_bytes():
                file.write(piece)
        found = _NAME.search(response.headers.get("content-disposition", ""))
        return found[1] if found else ""

    def send(self, path: str, data: bytes) -> Any:
        """A file to the service."""
        return self._call("POST", path, content=data, headers={"Content-Type": BINARY}).json()

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        """The events that answer a POST."""
        with self._reached(), self._http.stream("POST", path, json=body) as response:
            _raise_for(response)
            yield from parse_events(response.iter_lines())

    def follow(self, path: str, pause: float = 0.5) -> Iterator[Event]:
        """The events of a job up to its end, taken up again where they were when the connection is lost."""
        last, lost = "", 0
        while True:
            try:
                headers = {"Last-Event-ID": last} if last else {}
                with self._http.stream("GET", path, headers=headers) as response:
                    _raise_for(response)
                    for event in parse_events(response.iter_lines()):
                        last, lost = event.id or last, 0
                        yield event
                        if event.name in ("end", "error"):
                            return
            except httpx.TransportError as error:
                if lost >= RECONNECTS:
                    raise self._unreachable() from error
            lost += 1
            if lost > RECONNECTS:
                raise self._unreachable()
            time.sleep(pause)

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._reached():
            response = self._http.request(method, path, **options)
        _raise_for(response)
        return response

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise self._unreachable() from error

    def _unreachable(self) -> Unavailable:
        return Unavailable(
            f"no service answers at {self.url}. Start one with `palimpsest serve`, or say where it is with "
            "--url or PALIMPSEST_URL."
        )
