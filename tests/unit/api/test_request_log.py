"""The request log: api.request_log."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.errors import PayloadTooLarge, RateLimitExceeded
from api.request_log import REQUEST_ID_HEADER
from service.errors import QueueFull
from service.kit.ids import request_id
from service.kit.metrics import REGISTRY
from tests.support.application import PROMPT, TOWER, FakeWorker, TestApp

MADE = re.compile(r"req_[0-9A-Z]{26}")


@pytest.fixture
def log_records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture the request log at level info."""
    caplog.set_level(logging.INFO, "api.request_log")
    return caplog


def logged_fields(log_records: pytest.LogCaptureFixture) -> dict[str, Any]:
    (line,) = (line for line in log_records.records if line.name == "api.request_log")
    return {name: getattr(line, name) for name in ("method", "route", "status", "actor")}


def request_count(**labels: str) -> float:
    return REGISTRY.get_sample_value("palimpsest_http_requests_total", labels) or 0


@pytest.mark.parametrize("sent_id", ["a", "nightly.eval_7-b", "x" * 64])
def test_a_good_id_is_kept(client: TestClient, sent_id: str) -> None:
    """A valid X-Request-Id is returned in the response."""
    assert client.get("/healthz", headers={REQUEST_ID_HEADER: sent_id}).headers[REQUEST_ID_HEADER] == sent_id


@pytest.mark.parametrize("sent_id", ["", " ", "x" * 65, "a b", "a\tb", 'a"b', "é", "a;b", "{}"])
def test_invalid_request_ids_are_replaced(client: TestClient, sent_id: str) -> None:
    """A malformed X-Request-Id is replaced."""
    answer = client.get("/healthz", headers={REQUEST_ID_HEADER.encode(): sent_id.encode()})
    assert MADE.fullmatch(answer.headers[REQUEST_ID_HEADER])


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/edits", 405), ("GET", "/edits/x", 404)]
)
def test_every_answer_has_an_id(client: TestClient, method: str, path: str, status: int) -> None:
    """Error responses have a request id, also those of unknown paths and methods."""
    answer = client.request(method, path)
    assert answer.status_code == status
    assert MADE.fullmatch(answer.headers[REQUEST_ID_HEADER])


def test_a_fault_has_an_id_too(
    test_app: TestApp,
    client: TestClient,
    log_records: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A 500 has the request id and is logged."""
    monkeypatch.setattr(test_app.services.models, "describe", lambda: 1 / 0)
    answer = client.get("/models", headers={REQUEST_ID_HEADER: "mine"})
    assert (answer.status_code, answer.headers[REQUEST_ID_HEADER]) == (500, "mine")
    assert logged_fields(log_records)["status"] == 500


def test_one_line_for_a_request(client: TestClient, log_records: pytest.LogCaptureFixture) -> None:
    """A log line has the method, the route template, the status and the actor, and not the values in the
    path."""
    client.get("/edits/edit_secret")
    assert logged_fields(log_records) == {
        "method": "GET",
        "route": "/edits/{id}",
        "status": 404,
        "actor": "local",
    }
    assert "edit_secret" not in str(vars(log_records.records[-1]))


def test_successful_probes_are_logged_at_debug(
    test_app: TestApp,
    client: TestClient,
    log_records: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Successful probe requests are logged at level debug, and failed ones at level info."""
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
    assert not log_records.records
    monkeypatch.setattr(test_app.services.models, "check_ready", lambda: 1 / 0)
    client.get("/readyz")
    assert logged_fields(log_records)["route"] == "/readyz"


def test_no_content_is_logged(
    client: TestClient, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """No log line contains a body, a prompt, a generated text or a key, at any level."""
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": "Bearer pal_secret_key"}
    client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1}, headers=headers)
    client.post("/edits", json=TOWER, headers={**headers, "Prefer": "wait=10"})
    client.get("/edits", params={"subject": TOWER["subject"]}, headers=headers)
    logged = " ".join(str(vars(line)) for line in caplog.records if line.name.startswith(("api", "service")))
    assert logged
    for word in ("Eiffel", "Rome", "Paris", "pal_secret_key"):
        assert word not in logged


def test_requests_are_counted_by_template(client: TestClient) -> None:
    """Request metrics are labelled by route template. Unknown paths and methods share one series."""
    labels = {"route": "/edits/{id}", "method": "GET", "status": "404"}
    nowhere = {"route": "none", "method": "other", "status": "404"}
    before, lost = request_count(**labels), request_count(**nowhere)
    for name in ("a", "b", "c"):
        client.get(f"/edits/{name}")
        client.request(name.upper(), f"/{name}")
    assert request_count(**labels) == before + 3
    assert request_count(**nowhere) == lost + 3


def test_a_stream_is_noted_when_it_ends(
    client: TestClient, worker: FakeWorker, log_records: pytest.LogCaptureFixture
) -> None:
    """A stream is logged once, and counts as in progress until it ends."""
    with client.stream("POST", "/generate", json={"prompt": PROMPT, "stream": True}) as answer:
        assert REQUEST_ID_HEADER in answer.headers
        assert "event: end" in "\n".join(answer.iter_lines())
    assert (logged_fields(log_records)["route"], logged_fields(log_records)["status"]) == ("/generate", 200)
    assert REGISTRY.get_sample_value("palimpsest_http_requests_in_progress") == 0


def test_request_id_is_stored_with_jobs_and_calls(client: TestClient, test_app: TestApp) -> None:
    """A job stores the id of its HTTP request."""
    client.post("/edits", json=TOWER, headers={REQUEST_ID_HEADER: "edit-1"})
    (delivery,) = test_app.broker.receive(("edit",), 1, 0)
    job = test_app.worker_parts.jobs.claim(delivery.job_id)
    assert job is not None
    assert job.request_id == "edit-1"
    test_app.start_fake_worker().may_finish.clear()
    with client.stream(
        "POST", "/generate", json={"prompt": PROMPT, "stream": True}, headers={REQUEST_ID_HEADER: "call-1"}
    ):
        assert test_app.worker is not None
        test_app.worker.may_finish.set()
    assert request_id.get() == ""


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (QueueFull("full."), "queue"),
        (RateLimitExceeded("too fast."), "rate"),
        (PayloadTooLarge("too large."), "size"),
    ],
)
def test_refusals_are_counted_by_their_limit(
    test_app: TestApp, client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, limit: str
) -> None:
    """The metric of rejected requests is labelled by limit."""

    def refuse() -> None:
        raise error

    def count() -> float:
        return REGISTRY.get_sample_value("palimpsest_http_rejected_total", {"limit": limit}) or 0

    monkeypatch.setattr(test_app.services.models, "describe", refuse)
    before = count()
    assert client.get("/models").status_code in (413, 429)
    assert count() == before + 1
