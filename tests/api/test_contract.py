"""The OpenAPI document against the application, by schemathesis: in process, bounded, the same every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from house import PROMPT, TOWER, House
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("contract"), max_queue=100_000)
    house.hire()
    yield house
    house.close()


def schema(house: House) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", house.app)


OPERATIONS = [
    "POST /edits", "GET /edits", "GET /edits/{id}", "DELETE /edits/{id}", "GET /edits/{id}/delta",
    "GET /edits/{id}/events", "POST /trace", "GET /trace", "GET /trace/{id}", "DELETE /trace/{id}",
    "GET /trace/{id}/events", "POST /generate", "POST /compare", "GET /ledger", "GET /ledger/verify",
    "GET /models", "GET /healthz", "GET /readyz",
]  # fmt: skip


def test_every_operation_is_held_to_its_document(standing: House) -> None:
    """No operation is served that the tests below pass over."""
    served = [f"{m.upper()} {path}" for path, item in standing.app.openapi()["paths"].items() for m in item]
    assert sorted(served) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_document_tells_the_truth(standing: House, name: str, mode: schemathesis.GenerationMode) -> None:
    """Nothing that the document allows, or nearly allows, ends in a fault or in an answer that it does not describe."""
    method, path = name.split()
    operation = schema(standing)[path][method]

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def hold(case: schemathesis.Case) -> None:
        case.headers.pop("Prefer", None)  # it would only make the test wait
        case.call_and_validate(checks=CHECKS)

    try:
        hold()
    except Unsatisfiable:
        assert (
            mode is schemathesis.GenerationMode.NEGATIVE
        )  # an operation that takes nothing cannot be asked wrongly


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "{id}" in name])
def test_answers_about_what_exists_are_as_documented(standing: House, name: str) -> None:
    """What the document says of a resource is true of one that exists, has run, and is taken back."""
    method, path = name.split()
    operation = schema(standing)[path][method]
    client = TestClient(standing.app)
    asked = TOWER if path.startswith("/edits") else {"prompt": PROMPT, "subject": "Eiffel Tower"}
    collection = "/" + path.split("/")[1]
    ended = client.post(collection, json=asked, headers={"prefer": "wait=20"}).json()
    answer = operation.Case(path_parameters={"id": ended["id"]}).call_and_validate(checks=CHECKS)
    assert answer.status_code == 200
