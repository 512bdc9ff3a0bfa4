"""Limits of request bodies: every part has a maximum, and large bodies are handled outside the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.errors import MAX_REPORTED_ERRORS
from service.kit import large_json
from tests.support.application import TOWER, TestApp

JSON = {"content-type": "application/json"}


def request_schemas(test_app: TestApp) -> dict[str, Any]:
    """Return the schemas that request bodies refer to, by name."""
    document = test_app.app.openapi()
    schemas: dict[str, Any] = document["components"]["schemas"]
    bodies = [
        body["content"]["application/json"]["schema"]
        for path in document["paths"].values()
        for operation in path.values()
        if "application/json" in (body := operation.get("requestBody", {"content": {}}))["content"]
    ]
    used: dict[str, Any] = {}
    waiting = [reference for body in bodies for reference in references(body)]
    while waiting:
        name = waiting.pop().rsplit("/", 1)[-1]
        if name not in used:
            used[name] = schemas[name]
            waiting += references(schemas[name])
    return used


def references(schema: Any) -> Iterator[str]:
    """Yield every $ref in a schema."""
    for part in parts(schema, ""):
        if "$ref" in part[1]:
            yield part[1]["$ref"]


def parts(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in a schema, with its path."""
    if isinstance(schema, dict):
        yield path, schema
        for name, inner in schema.items():
            if name not in ("default", "examples"):
                yield from parts(inner, f"{path}.{name}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from parts(inner, path)


#: free objects whose content is validated later: against the method, or as a record of a data set
VALIDATED_LATER = {
    f"{request}.properties.records.anyOf.items" for request in ("EvaluationRequest", "TrainingRequest")
}


def test_every_part_of_a_request_has_a_maximum(test_app: TestApp) -> None:
    """Each text has a maximum length, each list a maximum number of items, each object its fields or a maximum."""
    unlimited = []
    for name, schema in request_schemas(test_app).items():
        for path, part in parts(schema, name):
            kind = part.get("type")
            if kind == "string" and not {"maxLength", "enum", "const"} & part.keys():
                unlimited.append(path)
            if kind == "array" and "maxItems" not in part:
                unlimited.append(path)
            is_free = part.get("additionalProperties", not part.get("properties")) is not False
            if kind == "object" and is_free and "maxProperties" not in part:
                unlimited.append(path)
    assert set(unlimited) - VALIDATED_LATER == set()


def test_many_invalid_fields_are_reported_up_to_a_maximum(client: TestClient) -> None:
    """At most 20 errors are in the response, and the detail says how many there are."""
    answer = client.post(
        "/edits", json=TOWER | {f"unknown{i}": 0 for i in range(20)} | {"guard": {"x": 1, "y": 2}}
    )
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == MAX_REPORTED_ERRORS
    assert answer.json()["detail"].endswith("And 17 more.")


def test_large_bodies_are_validated_in_a_thread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body above 64 kB is parsed and validated outside the event loop, and gives the same response."""
    names = []
    parse = large_json.parse_json

    def record_thread(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return parse(*arguments)

    monkeypatch.setattr("api.protected_route.parse_json", record_thread)
    small = {"edits": [TOWER]}
    large = {"edits": [TOWER | {"probes": {"paraphrase": ["The {} stands in"] * 50}}] * 80}
    for body in (small, large):
        assert client.post("/edits", json=body).status_code == 202
    assert names[0] != names[1] and "worker" in names[1].lower()
    invalid = {"edits": [large["edits"][0] | {"unknown": 1}]}
    problem = client.post("/edits", json=invalid).json()
    assert problem["errors"] == [
        {"field": "edits.0.unknown", "detail": "is not a known field: remove it or check its spelling."}
    ]


@pytest.mark.parametrize(
    "number", ["1e999", "-1E+400", "1" + "0" * 400 + ".0", "9" * 5000, "NaN", "Infinity"]
)
def test_numbers_that_are_not_finite_are_malformed(client: TestClient, number: str) -> None:
    """A number that is no finite float, or has too many digits, is 400 wherever it stands."""
    raw = b'{"prompt": "x", "temperature": ' + number.encode() + b"}"
    assert client.post("/generate", content=raw, headers=JSON).status_code == 400
