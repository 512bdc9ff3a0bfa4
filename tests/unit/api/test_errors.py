"""Errors as problem documents: api.errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from api import errors
from service import errors as domain_errors
from tests.support.application import PROMPT, TOWER, TestApp

JSON = {"content-type": "application/json"}
POSTS = ("/edits", "/trace", "/generate", "/compare")
MALFORMED = [
    b"{",
    b"NaN",
    b'{"prompt": Infinity}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'"\\ud800"',
    b'{"prompt": "\\udc00 is"}',
    b'{"\\ud800": 1}',
    b'{"prompt": "\xff\xfe"}',
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf{}",
    b"[" * 5000 + b"]" * 5000,
    b'{"hparams":' * 3000 + b"1" + b"}" * 3000,
    b"9" * 10_000,
    b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    b"prompt=x",
    b"\x00",
    '{"prompt": "x"}'.encode("utf-16"),
]


def assert_problem(answer: Any, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]


@pytest.mark.parametrize("path", POSTS)
def test_what_is_no_json_is_400(client: TestClient, path: str) -> None:
    """A malformed JSON body gets 400: invalid syntax, non-finite numbers, invalid UTF-8, lone surrogates,
    deep nesting or too many digits."""
    for body in MALFORMED:
        assert_problem(client.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize("declared", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", ";", "application/jsonp"])  # fmt: skip
def test_a_body_must_say_that_it_is_json(client: TestClient, declared: str | None) -> None:
    """A body of another media type gets 415, so a page of another origin cannot post without a preflight
    request."""
    headers = {} if declared is None else {"content-type": declared}
    assert_problem(client.post("/generate", content=b'{"prompt": "x"}', headers=headers), 415)


def test_json_may_name_its_charset(client: TestClient) -> None:
    """A charset parameter after application/json is accepted."""
    answer = client.post("/edits", json=TOWER, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 202


def test_no_body_at_all_is_422(client: TestClient) -> None:
    """A POST without a body gets 422."""
    for path in POSTS:
        assert_problem(client.post(path), 422)


def test_a_large_body_is_413(client: TestClient) -> None:
    """A body of more than one megabyte gets 413, with and without Content-Length."""
    large = b'{"prompt": "' + b"x" * 1_000_001 + b'"}'
    assert_problem(client.post("/generate", content=large, headers=JSON), 413)
    chunks = (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    assert_problem(client.post("/generate", content=chunks, headers=JSON), 413)
    assert_problem(
        client.post("/generate", content=b"{}", headers=JSON | {"content-length": "9" * 5000}), 413
    )


def test_paths_and_methods_that_are_not_served(client: TestClient) -> None:
    """Unknown paths get 404 and unknown methods 405, as problem documents."""
    assert_problem(client.get("/nowhere"), 404)
    assert_problem(client.get("/edits/"), 404)
    assert_problem(client.get("/%ff%00"), 404)
    answer = client.patch("/edits")
    assert_problem(answer, 405)
    assert set(answer.headers["allow"].split(", ")) <= {"GET", "POST"}
    assert_problem(client.get("/generate"), 405)


def test_a_hundred_random_bodies_give_no_fault(client: TestClient) -> None:
    """A random body gets a 4xx response with a problem document."""
    chance = random.Random(7)
    parts = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b":",
        b",",
        b"\\u",
        b"\\ud800",
        b"NaN",
        b"1e999",
        b"-",
        b"null",
        b"\xff",
    ]
    parts += [
        b"\x00",
        b"true",
        b"9" * 400,
        b'"prompt"',
        b'"subject"',
        b'"edits"',
        b"{}",
        b" ",
        "é".encode(),
        b"%s",
    ]
    for number in range(100):
        body = b"".join(chance.choices(parts, k=chance.randint(1, 25)))
        answer = client.post(POSTS[number % 4], content=body, headers=JSON)
        assert 400 <= answer.status_code < 500, body
        assert_problem(answer, answer.status_code)


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**63, 10**400, 1.5, -0.0, "", " ", "\x00", "{}", "%s%n", "\U0001f9e8", [], [[]], {}, {"a": 1}]
)  # fmt: skip
def test_any_value_in_any_field_gives_no_fault(client: TestClient, value: Any) -> None:
    """Any value in any one field is accepted or gets 422."""
    bodies: dict[str, dict[str, Any]] = {
        "/edits": TOWER | dict.fromkeys(("target_true", "method", "hparams", "probes", "guard", "dry_run")),
        "/trace": {"prompt": PROMPT, "subject": "Eiffel Tower"}
        | dict.fromkeys(
            ("target", "kinds", "window", "samples", "noise", "severed", "version", "seed", "compat")
        ),
    }
    for path, fields in bodies.items():
        valid_body = {name: of for name, of in fields.items() if of is not None}
        for name in fields:
            answer = client.post(path, json=valid_body | {name: value})
            assert answer.status_code in (202, 422), (name, answer.text)


def test_a_fault_hides_its_message(
    client: TestClient, test_app: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected exception gets 500 without its message or traceback."""

    def fails(*_: Any) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(test_app.services.models, "describe", fails)
    answer = client.get("/models")
    assert_problem(answer, 500)
    assert "swordfish" not in answer.text
    assert "Traceback" not in answer.text


def test_a_dead_database_is_503(
    client: TestClient, test_app: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unavailable database gets 503 with a message that names it and omits the driver's message."""

    def fails(*_: Any) -> None:
        raise OperationalError("SELECT secret", {}, Exception("host 10.1.2.3"))

    monkeypatch.setattr(test_app.services.models, "describe", fails)
    answer = client.get("/models")
    assert_problem(answer, 503)
    assert "database" in answer.json()["detail"]
    assert "SELECT" not in answer.text


def test_without_a_model_requests_are_503(tmp_path: Path, wiring: dict[str, Any]) -> None:
    """Routes that need a model return 503 until a worker has loaded one, while /healthz returns 200."""
    test_app = TestApp(tmp_path, register=False, **wiring)
    client = TestClient(test_app.app, raise_server_exceptions=False)
    for answer in (client.get("/models"), client.get("/readyz"), client.post("/edits", json=TOWER)):
        assert_problem(answer, 503)
    assert client.get("/healthz").json() == {"status": "alive"}
    test_app.close()


def test_a_problem_can_hold_any_text() -> None:
    """A lone surrogate in an error is replaced, and the problem document is encoded."""
    assert errors.encode_json({"detail": "\ud800 é"}) == '{"detail": "? é"}'.encode()


def test_every_domain_error_has_a_status() -> None:
    """Domain errors that can reach a client have a status; other domain errors are 500. Every status has a
    description."""
    assert errors.status_of(domain_errors.InvalidInput("x")) == 422
    assert errors.status_of(domain_errors.QueueFull("x")) == 429
    assert errors.status_of(domain_errors.LeaseLost("x")) == 500
    assert {int(status) for status in errors.STATUS_BY_ERROR.values()} <= set(errors.STATUS_DESCRIPTIONS)
