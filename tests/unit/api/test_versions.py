"""Names of versions over HTTP, and what takes them."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.support.application import PROMPT, TOWER, TestApp


@pytest.fixture
def worker_calls(test_app: TestApp) -> list[dict[str, object]]:
    """Return the calls that reach a worker."""
    return test_app.start_fake_worker().calls


def test_a_name_is_given_and_deleted(client: TestClient) -> None:
    """PUT answers 201 for a new name and 200 for a repetition, GET and DELETE with the name, and then 404."""
    named = client.put("/versions/before-release", json={"version": "base"})
    assert named.status_code == 201
    assert (
        named.json().items()
        >= {"name": "before-release", "version": 0, "model": "tiny@before-release"}.items()
    )
    assert client.put("/versions/before-release", json={}).status_code == 200
    assert client.get("/versions").json() == {"items": [named.json()], "next": None}
    assert client.delete("/versions/before-release").json() == named.json()
    assert client.get("/versions/before-release").status_code == 404
    assert client.delete("/versions/before-release").status_code == 404


@pytest.mark.parametrize("name", ["42", "-x", "x" * 65, "head", "base", "a b", "a@b"])
def test_what_cannot_be_a_name(client: TestClient, name: str) -> None:
    """A number, a word for a version, and a name with other signs are refused."""
    assert client.put(f"/versions/{name}", json={}).status_code == 422


def test_a_name_does_not_move(client: TestClient, worker_calls: list[dict[str, object]]) -> None:
    """A name of one version cannot be given to another one, and the answer says which version has it."""
    client.put("/versions/release", json={"version": "base"})
    client.post("/edits", json=TOWER, headers={"prefer": "wait=20"})
    answer = client.put("/versions/release", json={"version": "head"})
    assert (answer.status_code, answer.json()["version"]) == (409, 0)


def test_names_reach_workers_as_numbers(client: TestClient, worker_calls: list[dict[str, object]]) -> None:
    """Every call with a version accepts a name, alone or after the name of the model; a worker gets the number."""
    client.put("/versions/release", json={"version": "base"})
    prompt = {"prompt": PROMPT, "max_new_tokens": 1}
    assert client.post("/generate", json=prompt | {"version": "release"}).status_code == 200
    assert client.post("/generate", json=prompt | {"version": "tiny@release"}).status_code == 200
    message = {"messages": [{"role": "user", "content": "Hi"}], "version": "release", "max_new_tokens": 1}
    assert client.post("/generate", json=message).status_code == 200
    assert [call["version"] for call in worker_calls] == [0, 0, 0]
    client.post("/compare", json=prompt | {"versions": ["release", "head"]})
    assert worker_calls[-1]["versions"] == [0, "head"]
    openai = {"model": "tiny@release", "max_tokens": 1}
    assert client.post("/v1/completions", json=openai | {"prompt": PROMPT}).json()["model"] == "tiny@0"
    client.post("/v1/chat/completions", json=openai | {"messages": message["messages"]})
    assert [call["version"] for call in worker_calls[-2:]] == [0, 0]
    assert "tiny@release" in [model["id"] for model in client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize("path", ["/generate", "/compare", "/trace", "/exports"])
def test_an_unknown_name_is_refused(client: TestClient, path: str) -> None:
    """The error of an unknown name says where the names are listed, and names the field."""
    field = "versions" if path == "/compare" else "version"
    body = {
        "/generate": {"prompt": PROMPT, "version": "unknown"},
        "/compare": {"prompt": PROMPT, "versions": ["base", "unknown"]},
        "/trace": {"prompt": PROMPT, "subject": "Eiffel Tower", "version": "unknown"},
        "/exports": {"version": "unknown"},
    }[path]
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field and "GET /versions" in answer.json()["detail"]
