"""Requests and their answers: sent again where that is safe, problems raised, event streams taken up where they broke."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4

from palimpsest.errors import PalimpsestError, ServiceFailed, Unreachable, of_problem
from palimpsest.flow import Answer, Flow, Item, Line, Listing, Lost, Pause, Say, Send
from palimpsest.resources import Resource
from palimpsest.sse import Event, EventReader

R = TypeVar("R", bound=Resource)
AGAIN = (429, 502, 503, 504)  #: answers after which the same request may fare better
FIRST, LONGEST = 0.5, 8.0  #: seconds before the second try, and before any later one at most
PATIENCE = 60.0  #: seconds of `Retry-After` that are waited; a longer time is the caller's to plan
BINARY = "application/octet-stream"
LAST = ("end", "error")  #: the events after which none comes
PAGE = "200"  #: items; the most that the service gives at once


def given(**named: Any) -> dict[str, Any]:
    """What was given: None is left to the service."""
    return {name: value for name, value in named.items() if value is not None}


def pause(tried: int) -> float:
    """Seconds before the next try: twice as long each time, and not at the same moment for everybody."""
    return min(FIRST * 2.0**tried, LONGEST) * random.uniform(0.75, 1.25)


class Door:
    """Asks one service. `retries` is how often in a row one request is sent again."""

    def __init__(self, url: str, retries: int) -> None:
        self._url = url
        self._retries = retries
        self._met = False  # whoever mistypes an address should not wait for it

    def get(self, path: str, **params: Any) -> Flow[Any]:
        answer = yield from self.asked(Send("GET", path, params={k: str(v) for k, v in params.items()}))
        return self._json(answer)

    def file(self, path: str, media_type: str = "*/*", **params: str) -> Flow[bytes]:
        answer = yield from self.asked(Send("GET", path, params, headers={"Accept": media_type}))
        return answer.content

    def made(self, path: str, wait: float, **params: str) -> Flow[bytes]:
        """A file that takes time to make: asked for until it is there."""
        while True:
            answer = yield from self.asked(Send("GET", path, params, headers=_prefer(wait)))
            if answer.status != 202:
                return answer.content
            yield Pause(_seconds(answer) or pause(0))

    def items(self, path: str, kind: type[R], **params: Any) -> Listing[R]:
        """Says every item of a list, page after page."""
        after: dict[str, str] = {}
        while True:
            page = yield from self.get(path, limit=PAGE, **after, **params)
            for item in page["items"]:
                yield Say(kind.of(item))
            if not page.get("next"):
                return
            after = {"cursor": page["next"]}

    def read(self, path: str, body: Mapping[str, Any]) -> Flow[Any]:
        """A POST that changes nothing."""
        return self._json((yield from self.asked(Send("POST", path, body=body))))

    def create(self, path: str, body: Mapping[str, Any] | bytes, key: str | None, wait: float) -> Flow[Any]:
        """A POST that makes something: once, however often it has to be sent."""
        headers = {"Idempotency-Key": key or uuid4().hex, **_prefer(wait)}
        if isinstance(body, bytes):
            send = Send("POST", path, content=body, headers={**headers, "Content-Type": BINARY})
        else:
            send = Send("POST", path, body=body, headers=headers)
        return self._json((yield from self.asked(send)))

    def once(self, path: str) -> Flow[Any]:
        """A POST that is sent a single time, for its second answer would be another."""
        return self._json((yield from self.asked(Send("POST", path, body={}, again=False))))

    def look(self, path: str, wait: float) -> Flow[Any]:
        """A resource, held back by the service until it has ended or `wait` seconds are over."""
        return self._json((yield from self.asked(Send("GET", path, headers=_prefer(wait)))))

    def take_back(self, path: str, wait: float) -> Flow[Any]:
        return self._json((yield from self.asked(Send("DELETE", path, headers=_prefer(wait)))))

    def asked(self, send: Send) -> Flow[Answer]:
        """The good answer to a request; a problem is raised."""
        for tried in range(self._retries + 1):
            again = send.again and tried < self._retries
            seconds = pause(tried)
            try:
                answer: Answer = yield send
            except Lost as lost:
                if lost.silent or not again or (lost.nobody and not self._met):
                    raise self._unreachable(lost) from None
            else:
                self._met = True
                if answer.status < 400:
                    return answer
                error = _problem(answer)
                seconds = max(seconds, error.retry_after or 0.0)
                if answer.status not in AGAIN or not again or seconds > PATIENCE:
                    raise error
            yield Pause(seconds)
        raise AssertionError("the last try returns or raises")

    def spoken(
        self, path: str, body: Mapping[str, Any], hear: Callable[[Event], Listing[Item]]
    ) -> Listing[Item]:
        """The events that answer a POST. What broke off is not asked again: half of it has been heard."""
        yield from self.asked(Send("POST", path, body=body, streamed=True))
        reader = EventReader()
        try:
            while (event := (yield from _event(reader))) is not None:
                yield from hear(event)
                if event.name in LAST:
                    return
        except Lost as lost:
            raise self._unreachable(lost) from None
        raise Unreachable(f"the service at {self._url} broke off in the middle: ask again.")

    def followed(self, path: str, hear: Callable[[Event], None]) -> Flow[None]:
        """The events of a job up to its end, taken up after the last one that was heard when the connection is lost."""
        last, tried = "", 0
        lost = Lost("the stream ended before the job did")
        while tried <= self._retries:
            headers = {"Last-Event-ID": last} if last else {}
            yield from self.asked(Send("GET", path, headers=headers, streamed=True))
            reader = EventReader()
            try:
                while (event := (yield from _event(reader))) is not None:
                    last, tried = event.id or last, 0
                    hear(event)
                    if event.name in LAST:
                        return
            except Lost as again:
                lost = again
            yield Pause(pause(tried))
            tried += 1
        raise self._unreachable(lost)

    def _json(self, answer: Answer) -> Any:
        try:
            return json.loads(answer.content)
        except ValueError:
            raise ServiceFailed(
                f"{self._url} answered something that is no JSON: is this the address of a Palimpsest service?",
                status=answer.status,
            ) from None

    def _unreachable(self, lost: Lost) -> Unreachable:
        if lost.silent:
            return Unreachable(
                f"{self._url} {lost}: give the client a longer `timeout`, or see what holds it."
            )
        return Unreachable(
            f"no service answers at {self._url} ({lost}). Start one with `palimpsest serve`, or say where it is: "
            "Client(url) or PALIMPSEST_URL."
        )


def _event(reader: EventReader) -> Flow[Event | None]:
    """The next event of the answer that is streamed; None where it breaks off."""
    while (line := (yield Line())) is not None:
        if (event := reader.read(line)) is not None:
            return event
    return None


def _seconds(answer: Answer) -> float | None:
    """When to come back, if the answer says so."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def _prefer(wait: float) -> dict[str, str]:
    return {"Prefer": f"wait={int(wait)}"} if wait >= 1 else {}


def _problem(answer: Answer) -> PalimpsestError:
    try:
        found = json.loads(answer.content)
    except ValueError:
        found = None
    return of_problem(
        answer.status,
        found if isinstance(found, dict) else {},
        _seconds(answer),
        answer.headers.get("x-request-id"),
    )
