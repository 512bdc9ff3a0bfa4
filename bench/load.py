"""The clients of the chaos bench: threads that go through their wishes and ask again when they are not answered.

A client asks again after a broken connection, a silence, a 429 or a 503, with the same Idempotency-Key; every other
answer is final. So it does what `docs/api.md` tells a client to do, and nothing that a client could not do.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import httpx

from bench.journal import Answer, Journal, Resource, Token
from bench.plan import Wish

AGAIN = {429, 503}
PATIENCE = 180.0  # seconds after which a wish that nobody grants is given up, which is a failure
SILENCE = 20.0  # seconds without a byte after which a connection is taken for dead
PAUSE = 0.3  # seconds before asking again
WAIT = 5  # seconds of `Prefer: wait`


class Broken(Exception):
    """Not answered this time: ask again."""


class Client(threading.Thread):
    """One of them. It ends when `stop` is set and its present wish is granted."""

    def __init__(
        self,
        name: str,
        wishes: Iterator[Wish],
        addresses: Sequence[str],
        journal: Journal,
        stop: threading.Event,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.journal, self.patience = journal, patience
        self._wishes, self._stop_asked = wishes, stop
        self._numbers = itertools.count()
        first = sum(map(ord, name)) % len(addresses)  # clients begin at different doors
        self._doors = itertools.cycle([*addresses[first:], *addresses[:first]])
        self._http = httpx.Client(base_url=next(self._doors), timeout=httpx.Timeout(SILENCE, connect=3.0))

    def run(self) -> None:
        with self._http:
            for wish in self._wishes:
                if self._stop_asked.wait(wish.pause):
                    return
                try:
                    getattr(self, f"_{wish.action}")(wish)
                except Exception as error:  # a client that falls must not be a client that is content
                    self.journal.trouble(f"{self.name} fell over {wish.action}: {error!r}")

    # the wishes

    def _edit(self, wish: Wish) -> None:
        self._job(wish, "/edits")

    def _trace(self, wish: Wish) -> None:
        self._job(wish, "/trace")

    def _revert(self, wish: Wish) -> None:
        if (edit := self.journal.standing(wish.share)) is None:
            return
        for _ in range(2 if wish.twice else 1):
            if found := self._until("revert", "DELETE", f"/edits/{edit}"):
                self.journal.heard(found)

    def _job(self, wish: Wish, path: str) -> None:
        key = f"{self.name}-{next(self._numbers)}".replace(" ", "-")
        post = partial(
            self._until, wish.action, "POST", path, json=wish.body, headers={"Idempotency-Key": key}
        )
        if (found := post()) is None:
            return
        self.journal.accepted(key, found)
        if wish.twice and (same := post()):
            self.journal.accepted(key, same)
        mine = f"{path}/{found['id']}"
        if wish.cancel and (gone := self._until("cancel", "DELETE", mine)):
            self.journal.heard(gone)
        if wish.patient == "read":
            self._read(mine)
        elif wish.patient == "listen":
            self._listen(mine)

    def _read(self, path: str) -> None:
        """Read a job until it has ended, however often its reader is cut off."""
        give_up = time.monotonic() + self.patience
        while time.monotonic() < give_up:
            found = self._until("read", "GET", path, headers={"Prefer": f"wait={WAIT}"})
            if found is None:
                return
            self.journal.heard(found)
            if found["status"] not in ("queued", "running"):
                return
        self.journal.gave_up(f"{self.name}: the end of {path}")

    def _listen(self, path: str) -> None:
        """Follow the events of a job to its end, going on after the last one heard when the connection breaks."""
        last: dict[str, str] = {}

        def once() -> Resource:
            with self._http.stream("GET", f"{path}/events", headers=last) as response:
                _check(response)
                for number, name, data in events(response.iter_lines()):
                    if name == "error":
                        raise Broken(f"error: {data['title']}")
                    if number:
                        self._grow(path, last.get("Last-Event-ID"), number)
                        last["Last-Event-ID"] = number
                    if name == "end":
                        return data
            raise Broken("the stream ended early")

        if found := self._again("listen", once):
            self.journal.heard(found)

    def _grow(self, path: str, before: str | None, number: str) -> None:
        if before is not None and int(number) <= int(before):
            self.journal.trouble(f"{self.name} heard event {number} of {path} after {before}")

    def _generate(self, wish: Wish) -> None:
        body, pinned, least = dict(wish.body), None, None
        if wish.version == "pinned":
            body["version"] = pinned = int(wish.share * (self.journal.newest + 1))
        elif wish.version == "seen":
            body["min_version"] = least = self.journal.newest
        listen = self._stream if body.pop("stream") else self._hold

        def once() -> Answer:
            return listen(body, asked(wish.body), pinned, least)

        if answer := self._again("generate", once):
            self.journal.answered([answer])

    def _compare(self, wish: Wish) -> None:
        versions = [0, int(wish.share * (self.journal.newest + 1))]
        found = self._until("compare", "POST", "/compare", json={**wish.body, "versions": versions})
        if found is None:
            return
        if [side["version"] for side in found["sides"]] != versions:
            self.journal.trouble(f"{self.name} asked to compare {versions} and was given {found['sides']}")
        self.journal.answered(
            Answer(self.name, asked(wish.body), side["version"], (side["text"],), pinned)
            for side, pinned in zip(found["sides"], versions, strict=True)
        )

    # asking

    def _until(self, action: str, method: str, path: str, **request: Any) -> Resource | None:
        """The body of the answer, asked for again and again; None when it was refused or given up."""
        found: Resource | None = self._again(
            action, lambda: _body(self._http.request(method, path, **request))
        )
        return found

    def _again(self, action: str, once: Callable[[], Any]) -> Any:
        give_up = time.monotonic() + self.patience
        while time.monotonic() < give_up:
            began = time.monotonic()
            outcome, result = _outcome(once)
            self.journal.attempt(self.name, action, outcome, began)
            if result is not None or (outcome.isdecimal() and int(outcome) not in AGAIN):
                return result
            self._http.base_url = httpx.URL(next(self._doors))
            time.sleep(PAUSE)
        self.journal.gave_up(f"{self.name}: {action}")
        return None

    def _hold(self, body: Resource, question: Resource, pinned: int | None, least: int | None) -> Answer:
        found = _body(self._http.post("/generate", json=body))
        texts = tuple(choice["text"] for choice in found.get("choices") or [found])
        return Answer(self.name, question, found["version"], texts, pinned, least)

    def _stream(self, body: Resource, question: Resource, pinned: int | None, least: int | None) -> Answer:
        heard: list[Token] = []
        restarts = 0
        with self._http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            _check(response)
            try:
                for _, name, data in events(response.iter_lines()):
                    if name == "token":
                        heard.append(Token(data["index"], data["text"], data["version"]))
                    elif name == "restart":
                        heard, restarts = [], restarts + 1
                    elif name == "error":
                        raise Broken(f"error: {data['title']}")
                    elif name == "end":
                        texts = tuple(choice["text"] for choice in data["choices"])
                        said = tuple(heard)
                        return Answer(
                            self.name, question, data["version"], texts, pinned, least, said, restarts
                        )
            except (httpx.HTTPError, Broken):
                self._keep_part(question, heard, pinned, least)
                raise
        self._keep_part(question, heard, pinned, least)
        raise Broken("the stream ended early")

    def _keep_part(
        self, question: Resource, heard: list[Token], pinned: int | None, least: int | None
    ) -> None:
        """What was heard of an answer that broke off must be right too."""
        if heard:
            part = Answer(self.name, question, heard[0].version, (), pinned, least, tuple(heard))
            self.journal.answered([part])


def asked(body: Resource) -> Resource:
    """What the text depends on, besides the version."""
    return {name: value for name, value in body.items() if name != "stream"}


def events(lines: Iterator[str]) -> Iterator[tuple[str, str, Resource]]:
    """(id, name, data) of each server-sent event."""
    number = name = ""
    for line in lines:
        kind, _, value = line.partition(": ")
        if kind == "id":
            number = value
        elif kind == "event":
            name = value
        elif kind == "data":
            yield number, name, json.loads(value)
            number = ""


class _Refused(Exception):
    """Answered, and not with what was asked for."""


def _check(response: httpx.Response) -> None:
    if not response.is_success:
        raise _Refused(str(response.status_code))


def _body(response: httpx.Response) -> Resource:
    _check(response)
    return response.json()  # type: ignore[no-any-return]


def _outcome(once: Callable[[], Any]) -> tuple[str, Any]:
    """What became of one request, and what it gave."""
    try:
        return "200", once()
    except _Refused as refused:
        return str(refused), None
    except Broken as broken:
        return str(broken), None
    except httpx.TimeoutException:
        return "silence", None
    except (httpx.HTTPError, json.JSONDecodeError):
        return "connection broken", None
