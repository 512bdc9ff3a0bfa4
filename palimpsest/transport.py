"""Requests and their answers: sent again where that is safe, problems raised, event streams taken up where they broke."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4

from palimpsest.errors import PalimpsestError, ServerError, Unreachable, error_from_problem
from palimpsest.flow import ConnectionLost, Emit, Flow, Item, Listing, ReadLine, Request, Response, Sleep
from palimpsest.resources import Resource
from palimpsest.sse import Event, EventReader

R = TypeVar("R", bound=Resource)
RETRYABLE_STATUSES = (429, 502, 503, 504)  #: answers after which the same request may fare better
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 8.0  #: seconds before the second try, and before any later one at most
MAX_RETRY_AFTER = 60.0  #: seconds of `Retry-After` that are waited; a longer time is the caller's to plan
OCTET_STREAM = "application/octet-stream"
TERMINAL_EVENTS = ("end", "error")  #: the events after which none comes
PAGE_SIZE = "200"  #: items; the most that the service gives at once


def drop_none(**fields: Any) -> dict[str, Any]:
    """What was given: None is left to the service."""
    return {name: value for name, value in fields.items() if value is not None}


def backoff_seconds(attempt: int) -> float:
    """Seconds before the next try: twice as long each time, and not at the same moment for everybody."""
    return min(INITIAL_BACKOFF * 2.0**attempt, MAX_BACKOFF) * random.uniform(0.75, 1.25)


class Transport:
    """Asks one service. `retries` is how often in a row one request is sent again."""

    def __init__(self, url: str, retries: int) -> None:
        self._url = url
        self._retries = retries
        self._has_connected = False  # whoever mistypes an address should not wait for it

    def get(self, path: str, **params: Any) -> Flow[Any]:
        response = yield from self.send_with_retries(
            Request("GET", path, params={k: str(v) for k, v in params.items()})
        )
        return self._parse_json(response)

    def download(self, path: str, media_type: str = "*/*", **params: str) -> Flow[bytes]:
        response = yield from self.send_with_retries(
            Request("GET", path, params, headers={"Accept": media_type})
        )
        return response.content

    def download_when_ready(self, path: str, wait: float, **params: str) -> Flow[bytes]:
        """A file that takes time to make: asked for until it is there."""
        while True:
            response = yield from self.send_with_retries(
                Request("GET", path, params, headers=_prefer_header(wait))
            )
            if response.status != 202:
                return response.content
            yield Sleep(_retry_after(response) or backoff_seconds(0))

    def iter_items(self, path: str, kind: type[R], **params: Any) -> Listing[R]:
        """Says every item of a list, page after page."""
        cursor_params: dict[str, str] = {}
        while True:
            page = yield from self.get(path, limit=PAGE_SIZE, **cursor_params, **params)
            for item in page["items"]:
                yield Emit(kind.from_json(item))
            if not page.get("next"):
                return
            cursor_params = {"cursor": page["next"]}

    def post_query(self, path: str, body: Mapping[str, Any]) -> Flow[Any]:
        """A POST that changes nothing."""
        return self._parse_json((yield from self.send_with_retries(Request("POST", path, body=body))))

    def create(self, path: str, body: Mapping[str, Any] | bytes, key: str | None, wait: float) -> Flow[Any]:
        """A POST that makes something: once, however often it has to be sent."""
        headers = {"Idempotency-Key": key or uuid4().hex, **_prefer_header(wait)}
        if isinstance(body, bytes):
            request = Request("POST", path, content=body, headers={**headers, "Content-Type": OCTET_STREAM})
        else:
            request = Request("POST", path, body=body, headers=headers)
        return self._parse_json((yield from self.send_with_retries(request)))

    def post_once(self, path: str) -> Flow[Any]:
        """A POST that is sent a single time, for its second answer would be another."""
        return self._parse_json(
            (yield from self.send_with_retries(Request("POST", path, body={}, idempotent=False)))
        )

    def long_poll(self, path: str, wait: float) -> Flow[Any]:
        """A resource, held back by the service until it has ended or `wait` seconds are over."""
        return self._parse_json(
            (yield from self.send_with_retries(Request("GET", path, headers=_prefer_header(wait))))
        )

    def delete(self, path: str, wait: float) -> Flow[Any]:
        return self._parse_json(
            (yield from self.send_with_retries(Request("DELETE", path, headers=_prefer_header(wait))))
        )

    def send_with_retries(self, request: Request) -> Flow[Response]:
        """The good answer to a request; a problem is raised."""
        for attempt in range(self._retries + 1):
            may_retry = request.idempotent and attempt < self._retries
            delay = backoff_seconds(attempt)
            try:
                response: Response = yield request
            except ConnectionLost as loss:
                if loss.timed_out or not may_retry or (loss.never_connected and not self._has_connected):
                    raise self._unreachable(loss) from None
            else:
                self._has_connected = True
                if response.status < 400:
                    return response
                error = _problem_error(response)
                delay = max(delay, error.retry_after or 0.0)
                if response.status not in RETRYABLE_STATUSES or not may_retry or delay > MAX_RETRY_AFTER:
                    raise error
            yield Sleep(delay)
        raise AssertionError("the last try returns or raises")

    def stream_events(
        self, path: str, body: Mapping[str, Any], on_event: Callable[[Event], Listing[Item]]
    ) -> Listing[Item]:
        """The events that answer a POST. What broke off is not asked again: half of it has been heard."""
        yield from self.send_with_retries(Request("POST", path, body=body, streamed=True))
        reader = EventReader()
        try:
            while (event := (yield from _next_event(reader))) is not None:
                yield from on_event(event)
                if event.name in TERMINAL_EVENTS:
                    return
        except ConnectionLost as loss:
            raise self._unreachable(loss) from None
        raise Unreachable(f"the service at {self._url} broke off in the middle: ask again.")

    def follow_events(self, path: str, on_event: Callable[[Event], None]) -> Flow[None]:
        """The events of a job up to its end, taken up after the last one that was heard when the connection is lost."""
        last_event_id, attempt = "", 0
        last_loss = ConnectionLost("the stream ended before the job did")
        while attempt <= self._retries:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            yield from self.send_with_retries(Request("GET", path, headers=headers, streamed=True))
            reader = EventReader()
            try:
                while (event := (yield from _next_event(reader))) is not None:
                    last_event_id, attempt = event.id or last_event_id, 0
                    on_event(event)
                    if event.name in TERMINAL_EVENTS:
                        return
            except ConnectionLost as loss:
                last_loss = loss
            yield Sleep(backoff_seconds(attempt))
            attempt += 1
        raise self._unreachable(last_loss)

    def _parse_json(self, response: Response) -> Any:
        try:
            return json.loads(response.content)
        except ValueError:
            raise ServerError(
                f"{self._url} answered something that is no JSON: is this the address of a Palimpsest service?",
                status=response.status,
            ) from None

    def _unreachable(self, loss: ConnectionLost) -> Unreachable:
        if loss.timed_out:
            return Unreachable(
                f"{self._url} {loss}: give the client a longer `timeout`, or see what holds it."
            )
        return Unreachable(
            f"no service answers at {self._url} ({loss}). Start one with `palimpsest serve`, or say where it is: "
            "Client(url) or PALIMPSEST_URL."
        )


def _next_event(reader: EventReader) -> Flow[Event | None]:
    """The next event of the answer that is streamed; None where it breaks off."""
    while (line := (yield ReadLine())) is not None:
        if (event := reader.feed_line(line)) is not None:
            return event
    return None


def _retry_after(response: Response) -> float | None:
    """When to come back, if the answer says so."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def _prefer_header(wait: float) -> dict[str, str]:
    return {"Prefer": f"wait={int(wait)}"} if wait >= 1 else {}


def _problem_error(response: Response) -> PalimpsestError:
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = None
    return error_from_problem(
        response.status,
        problem if isinstance(problem, dict) else {},
        _retry_after(response),
        response.headers.get("x-request-id"),
    )
