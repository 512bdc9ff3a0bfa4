"""POST, GET and DELETE of trainings."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.application import FakeWorker
from tests.support.scopes import TRAINING_RECORDS

BODY: dict[str, Any] = {"records": TRAINING_RECORDS, "layer": 0}
WAIT = {"prefer": "wait=20"}


def test_training(client: TestClient, worker: FakeWorker) -> None:
    """A training is created with a location, ends with its result, and is listed."""
    answer = client.post("/trainings", json=BODY, headers=WAIT)
    training = answer.json()
    assert answer.status_code == 200 and training["status"] == "done"
    assert answer.headers["location"] == f"/trainings/{training['id']}" == training["links"]["self"]
    assert training["request"]["records"] == len(TRAINING_RECORDS)
    assert client.get(f"/trainings/{training['id']}").json()["result"]["plan"] == {"layer": 0}
    assert [t["id"] for t in client.get("/trainings").json()["items"]] == [training["id"]]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"records": None}, "records"),
        ({"dataset": "facts"}, "records"),
        ({"records": []}, "records"),
        ({"records": TRAINING_RECORDS[:6]}, "records"),
        ({"records": [{}]}, "records"),
        ({"limit": 3}, "records"),
        ({"method": "rome"}, "method"),
        ({"layer": 99}, "layer"),
        ({"layer": -1}, "layer"),
        ({"steps": 0}, "steps"),
        ({"dimensions": 10**9}, "dimensions"),
        ({"false_open_rate": 0.9}, "false_open_rate"),
        ({"learning_rate": "x"}, "learning_rate"),
        ({"soul": 1}, "soul"),
    ],
)
def test_bad_trainings_are_refused(client: TestClient, changes: dict[str, Any], field: str) -> None:
    """An invalid training is refused with the name of the field, and nothing is queued."""
    answer = client.post("/trainings", json=BODY | changes)
    assert answer.status_code == 422
    assert field in answer.text
    assert client.get("/trainings").json()["items"] == []
