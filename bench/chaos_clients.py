"""The clients of the chaos bench: threads that carry out actions and retry requests that get no response.

A client retries after a broken connection, a timeout, a 429 or a 503, with the same Idempotency-Key. Every other
response is final. This is the behaviour that `docs/api.md` asks of clients.
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
from httpx_sse import EventSource

from bench.chaos_plan import ClientAction
from bench.client_log import ClientLog, GenerationRecord, Resource, TokenEvent

RETRY_STATUSES = {429, 503}
RETRY_TIMEOUT = 180.0  # seconds of retries after which an action is abandoned, which fails a check
READ_TIMEOUT = 20.0  # seconds without a byte after which a connection counts as broken
RETRY_PAUSE = 0.3  # seconds before a retry
PREFER_WAIT_SECONDS = 5  # seconds of `Prefer: wait`


class RetryableError(Exception):
    """The request may be retried."""


class ChaosClient(threading.Thread):
    """A client thread. It ends when `stop` is set and its current action has ended."""

    def __init__(
        self,
        name: str,
        actions: Iterator[ClientAction],
        addresses: Sequence[str],
        log: ClientLog,
        stop: threading.Event,
        retry_timeout: float = RETRY_TIMEOUT,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.log, self.retry_timeout = log, retry_timeout
        self._actions, self._stop_requested = actions, stop
        self._key_numbers = itertools.count()
        first = sum(map(ord, name)) % len(addresses)  # clients start with different APIs
        self._urls = itertools.cycle([*addresses[first:], *addresses[:first]])
        self._http = httpx.Client(base_url=next(self._urls), timeout=httpx.Timeout(READ_TIMEOUT, connect=3.0))

    def run(self) -> None:
        with self._http:
            for action in self._actions:
                if self._stop_requested.wait(action.pause):
                    return
                try:
                    getattr(self, f"_{action.kind}")(action)
                except Exception as error:  # an exception in a client fails a check
                    self.log.record_anomaly(f"{self.name} raised in {action.kind}: {error!r}")

    # actions

    def _edit(self, action: ClientAction) -> None:
        self._submit_job(action, "/edits")

    def _trace(self, action: ClientAction) -> None:
        self._submit_job(action, "/trace")

    def _revert(self, action: ClientAction) -> None:
        if (edit_id := self.log.pick_active_edit(action.fraction)) is None:
            return
        for _ in range(2 if action.repeat else 1):
            if resource := self._request_with_retry("revert", "DELETE", f"/edits/{edit_id}"):
                self.log.record_status(resource)

    def _submit_job(self, action: ClientAction, path: str) -> None:
        key = f"{self.name}-{next(self._key_numbers)}".replace(" ", "-")
        post = partial(
            self._request_with_retry,
            action.kind,
            "POST",
            path,
            json=action.body,
            headers={"Idempotency-Key": key},
        )
        if (resource := post()) is None:
            return
        self.log.record_accepted(key, resource)
        if action.repeat and (repeated := post()):
            self.log.record_accepted(key, repeated)
        job_path = f"{path}/{resource['id']}"
        if action.cancel and (cancelled := self._request_with_retry("cancel", "DELETE", job_path)):
            self.log.record_status(cancelled)
        if action.wait_mode == "read":
            self._poll_until_ended(job_path)
        elif action.wait_mode == "listen":
            self._follow_events(job_path)

    def _poll_until_ended(self, path: str) -> None:
        """Read a job until it has ended, across lost connections."""
        deadline = time.monotonic() + self.retry_timeout
        while time.monotonic() < deadline:
            resource = self._request_with_retry(
                "read", "GET", path, headers={"Prefer": f"wait={PREFER_WAIT_SECONDS}"}
            )
            if resource is None:
                return
            self.log.record_status(resource)
            if resource["status"] not in ("queued", "running"):
                return
        self.log.record_abandoned(f"{self.name}: the end of {path}")

    def _follow_events(self, path: str) -> None:
        """Follow the events of a job to its end; after a lost connection resume with `Last-Event-ID`."""
        headers: dict[str, str] = {}

        def once() -> Resource:
            with self._http.stream("GET", f"{path}/events", headers=headers) as response:
                _raise_for_status(response)
                for number, name, data in iter_events(response):
                    if name == "error":
                        raise RetryableError(f"error: {data['code']}")
                    if number:
                        self._check_event_order(path, headers.get("Last-Event-ID"), number)
                        headers["Last-Event-ID"] = number
                    if name == "end":
                        return data
            raise RetryableError("the stream ended early")

        if resource := self._retry("listen", once):
            self.log.record_status(resource)

    def _check_event_order(self, path: str, last_id: str | None, event_id: str) -> None:
        if last_id is not None and int(event_id) <= int(last_id):
            self.log.record_anomaly(f"{self.name} received event {event_id} of {path} after {last_id}")

    def _generate(self, action: ClientAction) -> None:
        body, pinned_version, min_version = dict(action.body), None, None
        if action.version_mode == "pinned":
            body["version"] = pinned_version = int(action.fraction * (self.log.newest_version + 1))
        elif action.version_mode == "seen":
            body["min_version"] = min_version = self.log.newest_version
        send = self._generate_streamed if body.pop("stream") else self._generate_unstreamed

        def once() -> GenerationRecord:
            return send(body, generation_inputs(action.body), pinned_version, min_version)

        if record := self._retry("generate", once):
            self.log.record_generations([record])

    def _compare(self, action: ClientAction) -> None:
        versions = [0, int(action.fraction * (self.log.newest_version + 1))]
        comparison = self._request_with_retry(
            "compare", "POST", "/compare", json={**action.body, "versions": versions}
        )
        if comparison is None:
            return
        if [side["version"] for side in comparison["sides"]] != versions:
            self.log.record_anomaly(
                f"{self.name} requested a comparison of {versions} and received {comparison['sides']}"
            )
        self.log.record_generations(
            GenerationRecord(
                self.name, generation_inputs(action.body), side["version"], (side["text"],), pinned
            )
            for side, pinned in zip(comparison["sides"], versions, strict=True)
        )

    # requests

    def _request_with_retry(self, action: str, method: str, path: str, **request: Any) -> Resource | None:
        """Return the body of the response after retries; None when the request was rejected or abandoned."""
        body: Resource | None = self._retry(
            action, lambda: _json_body(self._http.request(method, path, **request))
        )
        return body

    def _retry(self, action: str, attempt: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + self.retry_timeout
        while time.monotonic() < deadline:
            began = time.monotonic()
            outcome, result = _attempt_outcome(attempt)
            self.log.record_attempt(self.name, action, outcome, began)
            if result is not None or (outcome.isdecimal() and int(outcome) not in RETRY_STATUSES):
                return result
            self._http.base_url = httpx.URL(next(self._urls))
            time.sleep(RETRY_PAUSE)
        self.log.record_abandoned(f"{self.name}: {action}")
        return None

    def _generate_unstreamed(
        self, body: Resource, request: Resource, pinned_version: int | None, min_version: int | None
    ) -> GenerationRecord:
        response = _json_body(self._http.post("/generate", json=body))
        texts = tuple(choice["text"] for choice in response.get("choices") or [response])
        return GenerationRecord(self.name, request, response["version"], texts, pinned_version, min_version)

    def _generate_streamed(
        self, body: Resource, request: Resource, pinned_version: int | None, min_version: int | None
    ) -> GenerationRecord:
        tokens: list[TokenEvent] = []
        resets = 0
        with self._http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            _raise_for_status(response)
            try:
                for _, name, data in iter_events(response):
                    if name == "token":
                        tokens.append(TokenEvent(data["index"], data["text"], data["version"]))
                    elif name == "reset":
                        tokens, resets = [], resets + 1
                    elif name == "error":
                        raise RetryableError(f"error: {data['code']}")
                    elif name == "end":
                        texts = tuple(choice["text"] for choice in data["choices"])
                        token_events = tuple(tokens)
                        return GenerationRecord(
                            self.name,
                            request,
                            data["version"],
                            texts,
                            pinned_version,
                            min_version,
                            token_events,
                            resets,
                        )
            except (httpx.HTTPError, RetryableError):
                self._record_partial(request, tokens, pinned_version, min_version)
                raise
        self._record_partial(request, tokens, pinned_version, min_version)
        raise RetryableError("the stream ended early")

    def _record_partial(
        self, request: Resource, tokens: list[TokenEvent], pinned_version: int | None, min_version: int | None
    ) -> None:
        """Record the tokens of an incomplete stream; the checks compare them as well."""
        if tokens:
            part = GenerationRecord(
                self.name, request, tokens[0].version, (), pinned_version, min_version, tuple(tokens)
            )
            self.log.record_generations([part])


def generation_inputs(body: Resource) -> Resource:
    """Return the fields of a request that determine the text, apart from the version."""
    return {name: value for name, value in body.items() if name != "stream"}


def iter_events(response: httpx.Response) -> Iterator[tuple[str, str, Resource]]:
    """Yield (id, name, data) of each server-sent event."""
    for event in EventSource(response).iter_sse():
        if event.data:
            yield event.id, event.event, event.json()


class _HttpStatusError(Exception):
    """The response has an error status."""


def _raise_for_status(response: httpx.Response) -> None:
    if not response.is_success:
        raise _HttpStatusError(str(response.status_code))


def _json_body(response: httpx.Response) -> Resource:
    _raise_for_status(response)
    return response.json()  # type: ignore[no-any-return]


def _attempt_outcome(attempt: Callable[[], Any]) -> tuple[str, Any]:
    """Return the outcome of one request and its result, or None."""
    try:
        return "200", attempt()
    except _HttpStatusError as status:
        return str(status), None
    except RetryableError as error:
        return str(error), None
    except httpx.TimeoutException:
        return "timeout", None
    except (httpx.HTTPError, json.JSONDecodeError):
        return "connection broken", None
