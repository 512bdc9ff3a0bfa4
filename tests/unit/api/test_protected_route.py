"""Protected routes: the scopes of API keys and the limit of the body."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.protected_route import SCOPE_EXTENSION, ProtectedRoute, requires
from service.application.api_keys import ApiKeys, Scope
from tests.support.application import TestApp

#: routes that need no key: health, the OpenAPI document, and the console, which contains no data
OPEN_PATHS = {
    "/healthz",
    "/readyz",
    "/docs",
    "/docs/{name}",
    "/redoc",
    "/openapi.json",
    "/",
    "/console/{name}",
}
#: the scope of each route that is not a GET
EXPECTED_SCOPES = {
    "POST /edits": "edit",
    "POST /exports": "read",
    "DELETE /exports/{id}": "edit",
    "POST /import": "edit",
    "DELETE /edits/{id}": "edit",
    "POST /edits/revert": "edit",
    "POST /edits/preview": "read",
    "PUT /versions/{name}": "edit",
    "DELETE /versions/{name}": "edit",
    "POST /trace": "read",
    "DELETE /trace/{id}": "edit",
    "POST /evaluations": "edit",
    "DELETE /evaluations/{id}": "edit",
    "POST /trainings": "edit",
    "DELETE /trainings/{id}": "edit",
    "POST /generate": "read",
    "POST /compare": "read",
    "POST /v1/completions": "read",
    "POST /v1/chat/completions": "read",
    "POST /jobs/{id}/retry": "admin",
}
SCOPE_SETS = list(chain.from_iterable(combinations(Scope, size) for size in range(1, len(Scope) + 1)))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestApp]:
    test_app = TestApp(tmp_path_factory.mktemp("door"))
    yield test_app
    test_app.close()


@pytest.fixture(scope="module")
def tokens(app: TestApp) -> dict[tuple[Scope, ...], str]:
    """Create an API key for every set of scopes and return the tokens."""
    keys = ApiKeys(app.database)
    return {held: keys.create("-".join(held), held)[1] for held in SCOPE_SETS}


def all_routes(test_app: TestApp) -> Iterator[Any]:
    """Yield every route of the application, documented or not."""
    for route in test_app.app.routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else included.routes


def protected_routes(test_app: TestApp) -> list[tuple[str, str]]:
    """Return (method, path) of all protected routes."""
    return [(method, route.path) for route in all_routes(test_app) if isinstance(route, ProtectedRoute) for method in route.methods or ()]  # fmt: skip


def test_every_route_is_protected(app: TestApp) -> None:
    """Every route is protected, except health, the OpenAPI document and the console."""
    assert {route.path for route in all_routes(app) if not isinstance(route, ProtectedRoute)} == OPEN_PATHS
    assert protected_routes(app)


def example_path(path: str) -> str:
    """Return an example path of this route."""
    return path.replace("{id:path}", "nobody").replace("{id}", "nobody").replace("{name}", "nobody")


def error_detail(answer: Any) -> str:
    """Return the message of a rejection, in the error format of its route."""
    if answer.request.url.path.startswith("/v1/"):
        return str(answer.json()["error"]["message"])
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["detail"])


def test_every_route_has_its_scope(app: TestApp, tokens: dict[tuple[Scope, ...], str]) -> None:
    """Every route accepts exactly the keys with its scope or `admin`. Other keys get 403 that names the
    missing scope, and no key gets 401."""
    client = TestClient(app.app, raise_server_exceptions=False)
    for method, path in protected_routes(app):
        needed = "read" if method == "GET" else EXPECTED_SCOPES[f"{method} {path}"]
        for held, token in tokens.items():
            answer = client.request(method, example_path(path), headers={"Authorization": f"Bearer {token}"})
            allowed = needed in held or "admin" in held
            assert (answer.status_code != 403) is allowed, (method, path, held)
            assert answer.status_code != 401
            if not allowed:
                assert f"`{needed}`" in error_detail(answer)
        assert client.request(method, example_path(path)).status_code == 401


def test_scope_is_checked_before_the_body(app: TestApp, tokens: dict[tuple[Scope, ...], str]) -> None:
    """The scope is checked before the body is read."""
    headers = {"Authorization": f"Bearer {tokens[(Scope.READ,)]}"}
    assert TestClient(app.app).post("/edits", content=b"{", headers=headers).status_code == 403


def test_route_without_a_scope_is_rejected() -> None:
    """Adding a route that is not a GET without a scope raises TypeError."""
    router = APIRouter(route_class=ProtectedRoute)
    with pytest.raises(TypeError, match="declare the scope"):
        router.post("/forgotten")(lambda: None)


def test_declared_scope_is_that_of_the_route() -> None:
    """A GET route needs `read`, unless it declares another scope."""
    router = APIRouter(route_class=ProtectedRoute)
    router.get("/open")(lambda: None)
    router.get("/closed")(requires(Scope.ADMIN)(lambda: None))
    assert [route.access_rule.scope for route in router.routes if isinstance(route, ProtectedRoute)] == [
        "read",
        "admin",
    ]


def test_scopes_are_documented(app: TestApp) -> None:
    """Every operation that needs an API key has its scope in the OpenAPI document."""
    for path, operations in app.app.openapi()["paths"].items():
        for method, operation in operations.items():
            scope = None if path in OPEN_PATHS else EXPECTED_SCOPES.get(f"{method.upper()} {path}", "read")
            assert operation.get(SCOPE_EXTENSION) == scope, path


def test_authorization_errors_are_documented(app: TestApp) -> None:
    """Every protected operation documents 401, 403 and 429."""
    document = app.app.openapi()["paths"]
    for path, operations in document.items():
        for operation in operations.values():
            assert ({"401", "403", "429"} <= set(operation["responses"])) is (path not in OPEN_PATHS)


@pytest.mark.parametrize("more", [0, 1])
def test_the_largest_body_is_a_setting(tmp_path: Path, more: int) -> None:
    """A body of `max_body` bytes is accepted, and a larger one is rejected with and without Content-Length."""
    test_app = TestApp(tmp_path, max_body=2000)
    client = TestClient(test_app.app)
    body = b'{"prompt": "' + b"x" * (2000 + more - 14) + b'"}'
    assert len(body) == 2000 + more
    json = {"content-type": "application/json"}
    statuses = {
        client.post("/edits", content=body, headers=json).status_code,
        client.post("/edits", content=iter([body[:7], body[7:]]), headers=json).status_code,
    }
    test_app.close()
    assert statuses == {413 if more else 422}


def test_plain_routes_stay_what_they_are() -> None:
    """The responses that a route documents override those of ProtectedRoute."""
    router = APIRouter(route_class=ProtectedRoute)
    router.get("/own", responses={401: {"description": "mine"}})(lambda: None)
    (route,) = router.routes
    assert isinstance(route, APIRoute)
    assert route.responses[401] == {"description": "mine"}


def test_disconnect_during_the_body_is_no_fault(test_app: TestApp, caplog: pytest.LogCaptureFixture) -> None:
    """A client that closes the connection while it sends its body is a client error, without a traceback."""
    messages: Iterator[dict[str, Any]] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/edits",
        "raw_path": b"/edits",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    asyncio.run(test_app.app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]
