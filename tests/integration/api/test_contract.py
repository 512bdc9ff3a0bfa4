"""Schemathesis tests of the application against its OpenAPI document. They run in process, are bounded, and
are deterministic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pytest
import schemathesis
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

from tests.support import wirings
from tests.support.application import FAILING_OBJECT, PROMPT, TOWER, TestApp
from tests.support.scopes import TRAINING_RECORDS

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

#: deterministic
BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
TRACE = {"prompt": PROMPT, "subject": "Eiffel Tower"}
EVALUATION = {"records": [TOWER]}
TRAINING = {"records": TRAINING_RECORDS}
#: requests that create a resource: an edit that is applied, one that fails, ...
BODIES_BY_OPERATION: dict[str, list[dict[str, Any]]] = {
    "POST /edits": [TOWER, TOWER | {"target_new": FAILING_OBJECT}],
    "POST /trace": [TRACE],
    "POST /evaluations": [EVALUATION],
    "POST /trainings": [TRAINING],
    "POST /exports": [{"format": "edits"}],
}


@pytest.fixture(scope="module", params=wirings.ALL_WIRINGS)
def running_app(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestApp]:
    """An application with a fake worker and a large queue limit."""
    stores = wirings.store_settings(request)
    test_app = TestApp(tmp_path_factory.mktemp("contract"), max_queue=100_000, **stores)
    test_app.start_fake_worker()
    yield test_app
    test_app.close()


def openapi_schema(test_app: TestApp) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", test_app.app)


OPERATIONS = [
    "POST /edits", "GET /edits", "GET /edits/{id}", "DELETE /edits/{id}", "GET /edits/{id}/delta",
    "GET /edits/{id}/events", "GET /edits/export", "POST /edits/revert", "POST /edits/preview", "GET /versions",
    "GET /versions/{name}", "PUT /versions/{name}", "DELETE /versions/{name}", "GET /ledger/diff", "POST /trace", "GET /trace", "GET /trace/{id}", "DELETE /trace/{id}",
    "GET /trace/{id}/events", "POST /evaluations", "GET /evaluations", "GET /evaluations/{id}",
    "DELETE /evaluations/{id}", "GET /evaluations/{id}/events", "GET /evaluations/report",
    "POST /trainings", "GET /trainings", "GET /trainings/{id}", "DELETE /trainings/{id}", "GET /trainings/{id}/events", "POST /generate", "POST /compare", "GET /ledger", "GET /ledger/verify",
    "GET /models", "GET /healthz", "GET /readyz", "GET /metrics", "GET /jobs", "POST /jobs/{id}/retry", "POST /exports", "GET /exports", "GET /exports/{id}",
    "DELETE /exports/{id}", "GET /exports/{id}/events", "GET /exports/{id}/file", "POST /import",
    "POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models", "GET /v1/models/{id}",
]  # fmt: skip


def test_every_operation_is_in_the_contract_tests(running_app: TestApp) -> None:
    """The operations in the OpenAPI document are exactly those that this module tests."""
    http_client = [
        f"{m.upper()} {path}" for path, item in running_app.app.openapi()["paths"].items() for m in item
    ]
    assert sorted(http_client) == sorted(OPERATIONS)


# The validation of requests does not depend on the wiring.
@pytest.mark.parametrize("running_app", ["embedded"], indirect=True)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_responses_conform_to_the_document(
    running_app: TestApp, name: str, mode: schemathesis.GenerationMode
) -> None:
    """Generated valid and invalid requests cause no server error, and every response conforms to the OpenAPI
    document."""
    method, path = name.split()
    operation = openapi_schema(running_app)[path][method]

    @settings(BOUNDED, max_examples=8, phases=[Phase.explicit, Phase.generate])
    @given(operation.as_strategy(generation_mode=mode))
    def check_case(case: schemathesis.Case[Any]) -> None:
        case.headers.pop("Prefer", None)  # it would delay the response
        case.call_and_validate(checks=CHECKS)

    try:
        check_case()
    except Unsatisfiable:
        assert (
            mode is schemathesis.GenerationMode.NEGATIVE
        )  # an operation without input has no invalid requests


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "{id}" in name and "/v1/" not in name])
def test_answers_about_what_exists_are_as_documented(running_app: TestApp, name: str) -> None:
    """Successful responses about an existing resource conform to the OpenAPI document."""
    method, path = name.split()
    operation = openapi_schema(running_app)[path][method]
    client = TestClient(running_app.app)
    made_at, asked = {
        "edits": ("/edits", TOWER),
        "trace": ("/trace", TRACE),
        "evaluations": ("/evaluations", EVALUATION),
        "trainings": ("/trainings", TRAINING),
        "exports": ("/exports", {"format": "peft"}),
        "jobs": ("/edits", TOWER | {"target_new": FAILING_OBJECT}),
    }[path.split("/")[1]]
    if made_at == "/exports":  # the base model has no edits to export
        client.post("/edits", json=TOWER, headers={"prefer": "wait=20"})
    ended = client.post(made_at, json=asked, headers={"prefer": "wait=20"}).json()
    answer = operation.Case(path_parameters={"id": ended["id"]}).call_and_validate(checks=CHECKS)
    assert answer.status_code < 300


def test_answers_about_batches_and_names_are_as_documented(running_app: TestApp) -> None:
    """Successful responses about a batch, a table, a name and a difference conform to the OpenAPI document."""
    schema, client = openapi_schema(running_app), TestClient(running_app.app)
    client.post("/edits", json=TOWER | {"batch": "wrong"}, headers={"prefer": "wait=20"})
    table = "subject,prompt,target_new\nNile,{} is,long\nNile,no,long\n"
    name = {"name": "release-1"}
    answers = [
        schema["/edits/export"]["GET"].Case(query={"batch": "wrong"}),
        schema["/edits/export"]["GET"].Case(query={"batch": "wrong", "format": "json"}),
        schema["/edits"]["GET"].Case(query={"search": "eiffel", "since": "2026-01-01"}),
        schema["/edits/preview"]["POST"].Case(body={"csv": table}, media_type="application/json"),
        *(
            schema["/versions/{name}"]["PUT"].Case(
                path_parameters=name, body={}, media_type="application/json"
            )
            for _ in range(2)
        ),
        schema["/versions"]["GET"].Case(),
        schema["/versions/{name}"]["GET"].Case(path_parameters=name),
        schema["/edits/revert"]["POST"].Case(body={"batch": "wrong"}, media_type="application/json"),
        schema["/ledger/diff"]["GET"].Case(query={"before": "base", "after": "release-1"}),
        schema["/versions/{name}"]["DELETE"].Case(path_parameters=name),
    ]
    statuses = [case.call_and_validate(checks=CHECKS).status_code for case in answers]
    assert statuses == [200, 200, 200, 200, 201, *[200] * 6]


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"n": 2, "logprobs": 1}, {"prompt": [[1], [2, 3]]}, {"model": "tiny@?"}]
)
def test_completions_are_as_documented(running_app: TestApp, fields: dict[str, Any]) -> None:
    """Completions conform to the OpenAPI document."""
    operation = openapi_schema(running_app)["/v1/completions"]["POST"]
    body = {"model": "tiny", "prompt": PROMPT} | fields
    answer = operation.Case(body=body, media_type="application/json").call_and_validate(checks=CHECKS)
    assert answer.status_code == (404 if "?" in body["model"] else 200)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2, "logprobs": True, "top_logprobs": 1}])
def test_chat_completions_are_as_documented(running_app: TestApp, fields: dict[str, Any]) -> None:
    """Chat completions conform to the OpenAPI document."""
    operation = openapi_schema(running_app)["/v1/chat/completions"]["POST"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | fields
    operation.Case(body=body, media_type="application/json").call_and_validate(checks=CHECKS)


def test_names_are_as_documented(running_app: TestApp) -> None:
    """Every listed model name can be read and conforms to the OpenAPI document."""
    operation = openapi_schema(running_app)["/v1/models/{id}"]["GET"]
    for named in TestClient(running_app.app).get("/v1/models").json()["data"]:
        answer = operation.Case(path_parameters={"id": named["id"]}).call_and_validate(checks=CHECKS)
        assert answer.json() == named


@pytest.mark.parametrize("name", BODIES_BY_OPERATION)
def test_links_can_be_followed(running_app: TestApp, name: str) -> None:
    """Each link of a created resource, and each link after it, gives a documented response. Each succeeds at
    least once, a retry only for kinds with a failed job."""
    schema = openapi_schema(running_app)
    client = TestClient(running_app.app)
    method, path = name.split()
    response = running_app.app.openapi()["paths"][path][method.lower()]["responses"]["202"]
    links = [json_pointer_parts(link["operationRef"]) for link in response["links"].values()]
    if path == "/exports":  # the base model has no edits to export
        client.post("/edits", json=TOWER, headers={"prefer": "wait=20"})
    succeeded = set()
    for body, *pair in itertools.product(BODIES_BY_OPERATION[name], links, links):
        created = client.post(path, json=body, headers={"prefer": "wait=20"}).json()
        for linked_path, linked_method in pair:
            case = schema[linked_path][linked_method].Case(path_parameters={"id": created["id"]})
            if case.call_and_validate(checks=CHECKS).status_code < 300:
                succeeded.add((linked_path, linked_method))
    retried = any(FAILING_OBJECT in body.values() for body in BODIES_BY_OPERATION[name])
    assert succeeded == set(links) - (set() if retried else {("/jobs/{id}/retry", "POST")})


def json_pointer_parts(reference: str) -> tuple[str, str]:
    """Return (path, method) of the operation that an `operationRef` names."""
    path, method = unquote(reference).removeprefix("#/paths/").rsplit("/", 1)
    return path.replace("~1", "/"), method.upper()
