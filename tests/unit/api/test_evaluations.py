"""POST, GET and DELETE of evaluations, and their reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.application import EVALUATION_RESULT, TOWER, FakeWorker, TestApp

EVALUATION_BODY = {"records": [TOWER]}
WAIT = {"prefer": "wait=20"}


def test_an_evaluation_is_accepted_and_done(client: TestClient, worker: FakeWorker) -> None:
    """POST with Prefer: wait returns the Location and the finished evaluation. The list omits the result."""
    answer = client.post("/evaluations", json=EVALUATION_BODY, headers=WAIT)
    assert answer.status_code == 200
    evaluation = answer.json()
    assert answer.headers["location"] == f"/evaluations/{evaluation['id']}" == evaluation["links"]["self"]
    assert (evaluation["status"], evaluation["result"]) == ("done", EVALUATION_RESULT)
    assert evaluation["request"]["records"] == 1
    assert client.get(evaluation["links"]["self"]).json() == evaluation
    del evaluation["result"]
    assert client.get("/evaluations").json() == {"items": [evaluation], "next": None}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "records"),
        (EVALUATION_BODY | {"dataset": "facts"}, "records"),
        (EVALUATION_BODY | {"method": "magic"}, "method"),
        (EVALUATION_BODY | {"hparams": {"soul": 1}}, "hparams"),
        (EVALUATION_BODY | {"checkpoints": [0]}, "checkpoints.0"),
        (EVALUATION_BODY | {"soul": 1}, "soul"),
        (EVALUATION_BODY | {"limit": 0}, "limit"),
        ({"dataset": "everything"}, "dataset"),
        ({"records": []}, "records"),
        ({"records": [TOWER] * 2001}, "records"),
        ({"records": ["Eiffel Tower"]}, "records.0"),
        ({"records": [{"subject": "Eiffel Tower"}]}, "records"),
        ({"records": [TOWER | {"prompt": "{} is" + " far" * 80}]}, "records"),
    ],
)
def test_bad_evaluations_are_refused(client: TestClient, body: dict[str, Any], field: str) -> None:
    """Bad input gets 422 with the field, and no evaluation is queued."""
    answer = client.post("/evaluations", json=body)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert client.get("/evaluations").json()["items"] == []


def test_the_same_key_evaluates_once(client: TestClient) -> None:
    """A repeated Idempotency-Key returns the same evaluation; with other records it gets 422."""
    key = {"idempotency-key": "e"}
    first, again = (client.post("/evaluations", json=EVALUATION_BODY, headers=key) for _ in range(2))
    assert first.json() == again.json()
    other = {"records": [TOWER | {"target_new": "Berlin"}]}
    assert client.post("/evaluations", json=other, headers=key).status_code == 422


def test_delete_cancels_an_evaluation(client: TestClient) -> None:
    """DELETE cancels a queued evaluation and is idempotent. An unknown id gets 404."""
    evaluation = client.post("/evaluations", json={"dataset": "facts", "limit": 3}).json()
    for _ in range(2):
        answer = client.delete(evaluation["links"]["self"])
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert client.delete("/evaluations/evaluation_0").status_code == 404


def test_the_event_stream_ends_with_the_result(client: TestClient, worker: FakeWorker) -> None:
    """The event stream of an evaluation ends with an `end` event that has the result."""
    evaluation = client.post("/evaluations", json=EVALUATION_BODY, headers=WAIT).json()
    stream_text = client.get(evaluation["links"]["events"]).text
    assert "event: end" in stream_text and '"ES"' in stream_text


@pytest.mark.parametrize(
    ("accept", "content_type", "begins"),
    [
        ("text/html", "text/html; charset=utf-8", b"<!doctype html"),
        ("image/png", "image/png", b"\x89PNG"),
        ("image/svg+xml", "image/svg+xml", b"<?xml"),
        ("*/*", "application/json", b"{"),
    ],
)
def test_accept_chooses_the_form(
    client: TestClient, worker: FakeWorker, accept: str, content_type: str, begins: bytes
) -> None:
    """The Accept header selects the report, the plot or JSON of a finished evaluation."""
    evaluation = client.post("/evaluations", json=EVALUATION_BODY, headers=WAIT).json()
    answer = client.get(evaluation["links"]["self"], headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, content_type)
    assert answer.headers["vary"] == "Accept"
    assert answer.content.lstrip().lower().startswith(begins.lower())


def test_there_is_no_report_before_the_end(client: TestClient) -> None:
    """The report of an evaluation that has not finished gets 409."""
    evaluation = client.post("/evaluations", json=EVALUATION_BODY).json()
    answer = client.get(evaluation["links"]["self"], headers={"accept": "text/html"})
    assert answer.status_code == 409
    assert "evaluation is queued" in answer.json()["detail"]


def test_records_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    """POST /evaluations has a separate body limit; other routes have `max_body`."""
    test_app = TestApp(tmp_path, max_body=2000, max_records_body=10_000)
    client = TestClient(test_app.app)
    assert client.post("/evaluations", json={"records": [TOWER] * 40}).status_code == 202
    assert client.post("/evaluations", json={"records": [TOWER] * 200}).status_code == 413
    assert client.post("/edits", json={"edits": [TOWER] * 40}).status_code == 413
    test_app.close()


def finished(client: TestClient) -> str:
    answer = client.post("/evaluations", json=EVALUATION_BODY, headers=WAIT)
    return str(answer.json()["id"])


def test_evaluations_are_compared(client: TestClient, worker: FakeWorker) -> None:
    """The report of several evaluations is a page, or CSV with a line for each measure; an id counts once."""
    first, second = finished(client), finished(client)
    page = client.get("/evaluations/report", params={"id": [first, second, first]})
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.text.count("Methods and measures") == 1
    table = client.get("/evaluations/report", params={"id": [first], "format": "csv"})
    assert table.headers["content-type"].startswith("text/csv") and table.text.startswith('"model","method"')
    assert "attachment" in table.headers["content-disposition"]


def test_evaluations_without_results_are_not_compared(client: TestClient) -> None:
    """An evaluation that is not done gets 409, an unknown one 404, and no id or nine of them 422."""
    queued = client.post("/evaluations", json=EVALUATION_BODY).json()["id"]
    statuses = [
        client.get("/evaluations/report", params=params).status_code
        for params in ({"id": queued}, {"id": "evaluation_unknown"}, {}, {"id": [queued] * 9})
    ]
    assert statuses == [409, 404, 422, 422]
