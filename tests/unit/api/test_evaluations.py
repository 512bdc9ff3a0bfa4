"""POST, GET and DELETE of evaluations, and their reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.application import EVALUATED, TOWER, House

ASKED = {"records": [TOWER]}
WAIT = {"prefer": "wait=20"}


def test_an_evaluation_is_accepted_and_done(client: TestClient, worker: Any) -> None:
    """An evaluation is answered with its place; with Prefer: wait it is answered done. A list leaves out what it found."""
    answer = client.post("/evaluations", json=ASKED, headers=WAIT)
    assert answer.status_code == 200
    evaluation = answer.json()
    assert answer.headers["location"] == f"/evaluations/{evaluation['id']}" == evaluation["links"]["self"]
    assert (evaluation["status"], evaluation["result"]) == ("done", EVALUATED)
    assert evaluation["request"]["records"] == 1
    assert client.get(evaluation["links"]["self"]).json() == evaluation
    del evaluation["result"]
    assert client.get("/evaluations").json() == {"items": [evaluation], "next": None}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "records"),
        (ASKED | {"dataset": "facts"}, "records"),
        (ASKED | {"method": "magic"}, "method"),
        (ASKED | {"hparams": {"soul": 1}}, "hparams"),
        (ASKED | {"checkpoints": [0]}, "checkpoints.0"),
        (ASKED | {"soul": 1}, "soul"),
        (ASKED | {"limit": 0}, "limit"),
        ({"dataset": "everything"}, "dataset"),
        ({"records": []}, "records"),
        ({"records": [TOWER] * 2001}, "records"),
        ({"records": ["Eiffel Tower"]}, "records.0"),
        ({"records": [{"subject": "Eiffel Tower"}]}, "records"),
        ({"records": [TOWER | {"prompt": "{} is" + " far" * 80}]}, "records"),
    ],
)
def test_bad_evaluations_are_refused(client: TestClient, asked: dict[str, Any], field: str) -> None:
    """Bad input gets 422 with the field, and no evaluation is queued."""
    answer = client.post("/evaluations", json=asked)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert client.get("/evaluations").json()["items"] == []


def test_the_same_key_evaluates_once(client: TestClient) -> None:
    """An evaluation asked for twice under one Idempotency-Key is one evaluation; other records are another request."""
    key = {"idempotency-key": "e"}
    first, again = (client.post("/evaluations", json=ASKED, headers=key) for _ in range(2))
    assert first.json() == again.json()
    other = {"records": [TOWER | {"target_new": "Berlin"}]}
    assert client.post("/evaluations", json=other, headers=key).status_code == 422


def test_delete_cancels_an_evaluation(client: TestClient) -> None:
    """DELETE cancels a waiting evaluation; saying it twice is harmless."""
    evaluation = client.post("/evaluations", json={"dataset": "facts", "limit": 3}).json()
    for _ in range(2):
        answer = client.delete(evaluation["links"]["self"])
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert client.delete("/evaluations/evaluation_0").status_code == 404


def test_its_news_end_with_it(client: TestClient, worker: Any) -> None:
    """The events of an evaluation end with what it found."""
    evaluation = client.post("/evaluations", json=ASKED, headers=WAIT).json()
    news = client.get(evaluation["links"]["events"]).text
    assert "event: end" in news and '"ES"' in news


@pytest.mark.parametrize(
    ("accept", "given", "begins"),
    [
        ("text/html", "text/html; charset=utf-8", b"<!doctype html"),
        ("image/png", "image/png", b"\x89PNG"),
        ("image/svg+xml", "image/svg+xml", b"<?xml"),
        ("*/*", "application/json", b"{"),
    ],
)
def test_accept_chooses_the_form(
    client: TestClient, worker: Any, accept: str, given: str, begins: bytes
) -> None:
    """An evaluation that is done comes as its report, as the plot or as JSON."""
    evaluation = client.post("/evaluations", json=ASKED, headers=WAIT).json()
    answer = client.get(evaluation["links"]["self"], headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, given)
    assert answer.headers["vary"] == "Accept"
    assert answer.content.lstrip().lower().startswith(begins.lower())


def test_there_is_no_report_before_the_end(client: TestClient) -> None:
    """Asking for the report of an evaluation that is not done is 409."""
    evaluation = client.post("/evaluations", json=ASKED).json()
    answer = client.get(evaluation["links"]["self"], headers={"accept": "text/html"})
    assert answer.status_code == 409
    assert "evaluation is queued" in answer.json()["detail"]


def test_records_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    """A body with records has a limit of its own, and is refused above it; other bodies keep theirs."""
    house = House(tmp_path, max_body=2000, max_records_body=10_000)
    client = TestClient(house.app)
    assert client.post("/evaluations", json={"records": [TOWER] * 40}).status_code == 202
    assert client.post("/evaluations", json={"records": [TOWER] * 200}).status_code == 413
    assert client.post("/edits", json={"edits": [TOWER] * 40}).status_code == 413
    house.close()
