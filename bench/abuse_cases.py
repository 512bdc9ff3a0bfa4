"""The requests of `bench/abuse.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.abuse_store import EVALUATION_ID, LARGE_EDIT_ID, edit_body, edit_set
from service.settings import Settings
from tests.support.hostile_bodies import (
    JSON_PATHS,
    PUT_PATHS,
    encode,
    floods,
    header_flood,
    largest_records,
    record_floods,
    repeat_item,
)

PARALLEL = 30  #: requests at the same time
JSON_HEADERS = {"Content-Type": "application/json"}
FILE_HEADERS = {"Content-Type": "application/octet-stream"}
REFUSED = (400, 413, 415, 422, 429, 503)
ACCEPTED = (200, 202)
BUSY = (429, 503)


def _no_body() -> bytes:
    return b""


@dataclass(frozen=True)
class Case:
    """A request, how many of it are sent at the same time, and the statuses that are right."""

    name: str
    method: str
    path: str
    body: Callable[[], bytes] = _no_body
    headers: Mapping[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = ACCEPTED
    parallel: int = 1
    group: str = ""  #: cases of one group run in one server


def all_cases() -> list[Case]:
    """Return every case."""
    settings = Settings()
    return [
        *_largest_requests(settings),
        *_largest_answers(),
        *_hostile_records(settings.max_records_body),
        *_hostile_files(settings.max_import_body),
        *_floods(),
    ]


def _post(
    name: str, path: str, body: Callable[[], bytes], statuses: tuple[int, ...] = ACCEPTED, parallel: int = 1
) -> Case:
    headers = FILE_HEADERS if path == "/import" else JSON_HEADERS
    return Case(name, "POST", path, body, headers, statuses, parallel)


def _largest_requests(settings: Settings) -> Iterator[Case]:
    text = ("the word, " * 1000)[:9000]
    records = partial(largest_records, settings.max_records_body - 1000)
    edits = [
        {"subject": f"House {n}", "prompt": "{} is " + text[:800], "target_new": "Rome"} for n in range(400)
    ]
    imported = partial(edit_set, 180)
    conversation: dict[str, Any] = {
        "model": "large",
        "messages": [{"role": "user", "content": text}] * 2,
        "max_tokens": 1,
    }
    ids = {"model": "large", "prompt": [[100] * 4900] * 48, "max_tokens": 1}
    yield _post("one edit with all probes", "/edits", lambda: encode(edit_body()))
    yield _post("400 edits", "/edits", lambda: encode({"edits": edits}), (*ACCEPTED, 429))
    yield _post("400 edits", "/edits", lambda: encode({"edits": edits}), (*ACCEPTED, *BUSY), PARALLEL)
    yield _post("longest prompt", "/trace", lambda: encode({"subject": "the", "prompt": "the " * 4900}))
    named = [*conversation["messages"], {"role": "user", "content": "Where is the House?"}]
    traced = {"subject": "House", "messages": named}
    chat = traced | {"target_new": "Rome", "probes": {}}
    chats = {"edits": [chat | {"messages": [{"role": "user", "content": "House is " + text[:800]}]}] * 400}
    yield _post("longest conversation", "/edits", lambda: encode(chat))
    yield _post("longest conversation", "/trace", lambda: encode(traced))
    yield _post("400 conversations", "/edits", lambda: encode(chats), (*ACCEPTED, 429))
    yield _post("400 conversations", "/edits", lambda: encode(chats), (*ACCEPTED, *BUSY), PARALLEL)
    table = "subject,prompt,target_new\n" + "".join(
        f"House {n},{{}} is {text[:800]},Rome\n" for n in range(1000)
    )
    yield _post("table of 1,000 edits", "/edits/preview", lambda: encode({"csv": table}))
    yield _post(
        "table of 1,000 edits", "/edits/preview", lambda: encode({"csv": table}), (*ACCEPTED, *BUSY), PARALLEL
    )
    yield _post(
        "unknown edits", "/edits/revert", lambda: encode({"edits": [f"edit_{n:060}" for n in range(1000)]})
    )
    yield _post("longest prompt", "/compare", lambda: encode({"prompt": text}))
    yield _post("64 prompts", "/generate", lambda: encode({"prompts": [text] * 64}))
    yield _post(
        "64 prompts", "/generate", lambda: encode({"prompts": [text] * 64}), (*ACCEPTED, *BUSY), PARALLEL
    )
    yield _post("token ids", "/v1/completions", lambda: encode(ids))
    yield _post("token ids", "/v1/completions", lambda: encode(ids), (*ACCEPTED, *BUSY), PARALLEL)
    yield _post("longest conversation", "/v1/chat/completions", lambda: encode(conversation))
    yield _post(
        "longest conversation",
        "/v1/chat/completions",
        lambda: encode(conversation),
        (*ACCEPTED, *BUSY),
        PARALLEL,
    )
    yield _post("2,000 records", "/evaluations", records)
    yield Case(
        "2,000 records with a key", "POST", "/evaluations", records, JSON_HEADERS | {"Idempotency-Key": "a"}
    )
    yield _post("2,000 records", "/evaluations", records, (*ACCEPTED, *BUSY), PARALLEL)
    yield _post("2,000 records", "/trainings", records)
    yield _post("2,000 records", "/trainings", records, (*ACCEPTED, *BUSY), PARALLEL)
    yield _post("180 edits", "/import", imported, (*ACCEPTED, 429))
    yield Case("180 edits with a key", "POST", "/import", imported, FILE_HEADERS | {"Idempotency-Key": "a"})
    yield _post("2 whole weights", "/import", partial(edit_set, 2, "ft"))


def _largest_answers() -> Iterator[Case]:
    for path in (
        "/edits?limit=200",
        f"/edits/{LARGE_EDIT_ID}",
        "/ledger?limit=200",
        "/ledger/verify",
        "/ledger/diff?before=0&limit=200",
        "/edits/export?format=json",
        "/edits/export?format=csv&search=the",
        f"/evaluations/{EVALUATION_ID}",
        "/evaluations?limit=200",
        "/jobs?limit=200",
        f"/evaluations/{EVALUATION_ID}/events",
        "/models",
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/docs",
    ):
        yield Case("largest answer", "GET", path)
    yield Case("report", "GET", f"/evaluations/{EVALUATION_ID}", headers={"Accept": "text/html"})
    for path in ("/edits?limit=200", f"/evaluations/{EVALUATION_ID}", "/ledger/verify", "/ledger?limit=200"):
        yield Case("largest answer", "GET", path, parallel=PARALLEL)


def _flood_records(name: str, size: int) -> bytes:
    return record_floods(size)[name]


def _hostile_records(size: int) -> Iterator[Case]:
    for name in record_floods(1000):
        yield _post(name, "/evaluations", partial(_flood_records, name, size), REFUSED)
        yield _post(name, "/trainings", partial(_flood_records, name, size), REFUSED)
    for name in ("empty objects", "one record of lists"):
        yield _post(name, "/evaluations", partial(_flood_records, name, size), REFUSED, PARALLEL)
    yield _post("over the limit", "/evaluations", lambda: b"x" * (size + 1), REFUSED, PARALLEL)


def _hostile_files(size: int) -> Iterator[Case]:
    yield _post("150,000 tensors", "/import", lambda: header_flood(150_000), REFUSED)
    yield _post("a header of spaces", "/import", lambda: _padded(b"{}", size - 8), REFUSED)
    yield _post("2,000,000 tensors", "/import", lambda: header_flood(2_000_000), REFUSED)
    yield _post("no safetensors", "/import", lambda: bytes(size), REFUSED)
    yield _post("no safetensors", "/import", lambda: bytes(size), REFUSED, PARALLEL)


def _padded(header: bytes, size: int) -> bytes:
    return size.to_bytes(8, "little") + header.ljust(size)


def _encode_flood(name: str) -> bytes:
    return encode(floods()[name])


def _too_long_conversation() -> bytes:
    """Return a conversation of nearly a megabyte, with messages that are as long as a message may be."""
    messages = [{"role": "user", "content": "the word, " * 1_950}] * 50
    return encode({"model": "large", "messages": messages})


def _floods() -> Iterator[Case]:
    for path in JSON_PATHS:
        for name in floods():
            flood = partial(_encode_flood, name)
            method = "PUT" if path in PUT_PATHS else "POST"
            yield Case(name, method, path, flood, JSON_HEADERS, REFUSED, group=f"floods {path}")
    for parallel in (1, PARALLEL):
        yield _post(
            "conversation too long", "/v1/chat/completions", _too_long_conversation, REFUSED, parallel
        )
    yield _post(
        "empty objects", "/generate", lambda: repeat_item("prompts", "{}", 1_000_000), REFUSED, PARALLEL
    )
