"""POST, GET and DELETE of traces, and their images."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.application import FakeWorker

TRACE_BODY = {"prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower"}
WAIT = {"prefer": "wait=20"}


def test_a_trace_is_accepted_and_done(client: TestClient, worker: FakeWorker) -> None:
    """POST with Prefer: wait returns the Location and the finished trace."""
    answer = client.post("/trace", json=TRACE_BODY, headers=WAIT)
    assert answer.status_code == 200
    trace = answer.json()
    assert answer.headers["location"] == f"/trace/{trace['id']}" == trace["links"]["self"]
    assert trace["status"] == "done"
    assert trace["version"] == 0
    assert trace["request"]["subject"] == "Eiffel Tower"
    assert client.get("/trace").json() == {"items": [trace], "next": None}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"subject": "Big Ben"}, "subject"),
        ({"subject": ""}, "subject"),
        ({"prompt": "{} and {}"}, "prompt"),
        ({"prompt": "The Eiffel Tower " * 40}, "prompt"),
        ({"kinds": []}, "kinds"),
        ({"kinds": ["soul"]}, "kinds.0"),
        ({"window": 0}, "window"),
        ({"samples": 1000}, "samples"),
        ({"noise": "loud"}, "noise"),
        ({"noise": -1}, "noise"),
        ({"version": 3}, "version"),
        ({"version": "newest"}, "version"),
        ({"version": 10**300}, "version"),
        ({"version": -1}, "version"),
        ({"target": ""}, "target"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_traces_are_refused(client: TestClient, change: dict[str, Any], field: str) -> None:
    """Bad input gets 422 with the field, and no trace is queued."""
    answer = client.post("/trace", json=TRACE_BODY | change)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert client.get("/trace").json()["items"] == []


def test_the_same_key_traces_once(client: TestClient) -> None:
    """A repeated Idempotency-Key returns the same trace."""
    first, again = (
        client.post("/trace", json=TRACE_BODY, headers={"idempotency-key": "t"}) for _ in range(2)
    )
    assert first.json() == again.json()


def test_delete_cancels_a_trace(client: TestClient) -> None:
    """DELETE cancels a queued trace and is idempotent. An unknown id gets 404."""
    trace = client.post("/trace", json=TRACE_BODY).json()
    for _ in range(2):
        answer = client.delete(trace["links"]["self"])
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert client.delete("/trace/trace_0").status_code == 404


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("image/svg+xml", "image/svg+xml"),
        ("image/png", "image/png"),
        ("text/html", "text/html; charset=utf-8"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8"),
        ("image/*", "image/svg+xml"),
        ("image/svg+xml;q=0.5, image/png;q=0.7, */*;q=0.1", "image/png"),
        ("application/json;q=0, */*", "image/svg+xml"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("", "application/json"),
        ("IMAGE/PNG", "image/png"),
    ],
)
def test_accept_chooses_the_form(
    client: TestClient, worker: FakeWorker, accept: str, content_type: str
) -> None:
    """The Accept header selects the media type of a finished trace, and the response has `Vary: Accept`."""
    trace = client.post("/trace", json=TRACE_BODY, headers=WAIT).json()
    answer = client.get(trace["links"]["self"], headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == content_type
    assert answer.headers["vary"] == "Accept"
    if content_type == "image/svg+xml":
        assert answer.content.decode("utf-8").lstrip().startswith(("<svg", "<?xml"))
    if content_type == "image/png":
        assert answer.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("accept", ["text/plain", "image/webp", "*/*;q=0", "nonsense", "image/png;q=nan"])
def test_other_forms_are_not_acceptable(client: TestClient, accept: str) -> None:
    """An unsupported media type gets 406 with the supported ones."""
    trace = client.post("/trace", json=TRACE_BODY).json()
    answer = client.get(trace["links"]["self"], headers={"accept": accept})
    assert answer.status_code == 406
    assert "image/svg+xml" in answer.json()["detail"]


def test_there_is_no_picture_before_the_end(client: TestClient) -> None:
    """The image of a trace that has not finished gets 409."""
    trace = client.post("/trace", json=TRACE_BODY).json()
    answer = client.get(trace["links"]["self"], headers={"accept": "image/svg+xml"})
    assert answer.status_code == 409
    assert "queued" in answer.json()["detail"]
