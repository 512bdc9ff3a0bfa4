"""The door: what a key must be good for, and how large a body may be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from api.protected_route import SCOPES, Door
from service.application.api_keys import Keys, Scope
from tests.support.application import House

#: what is answered without a key: no content, the form of the interface, and a page that holds no data
OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json", "/", "/console/{name}"}
#: the scope of all that is no GET
NEEDED = {
    "POST /edits": "edit",
    "POST /import": "edit",
    "DELETE /edits/{id}": "edit",
    "POST /trace": "read",
    "DELETE /trace/{id}": "edit",
    "POST /evaluations": "edit",
    "DELETE /evaluations/{id}": "edit",
    "POST /generate": "read",
    "POST /compare": "read",
    "POST /v1/completions": "read",
    "POST /jobs/{id}/retry": "admin",
}
SETS = list(chain.from_iterable(combinations(Scope, size) for size in range(1, len(Scope) + 1)))


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("door"))
    yield house
    house.close()


@pytest.fixture(scope="module")
def tokens(closed: House) -> dict[tuple[Scope, ...], str]:
    """A key for every set of scopes."""
    keys = Keys(closed.database)
    return {held: keys.create("-".join(held), held)[1] for held in SETS}


def routes(house: House) -> Iterator[Any]:
    """Every route of the application, documented or not."""
    for route in house.app.routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else included.routes


def served(house: House) -> list[tuple[str, str]]:
    """(method, path) of all that is behind the door."""
    return [(method, route.path) for route in routes(house) if isinstance(route, Door) for method in route.methods or ()]  # fmt: skip


def test_no_route_stands_beside_the_door(closed: House) -> None:
    """Every route is behind the door, but for health, the description of the interface and the console."""
    assert {route.path for route in routes(closed) if not isinstance(route, Door)} == OPEN
    assert served(closed)


def named(path: str) -> str:
    """A path of this route."""
    return path.replace("{id:path}", "nobody").replace("{id}", "nobody")


def said(answer: Any) -> str:
    """The words of a refusal, in the form of its part of the interface."""
    if answer.request.url.path.startswith("/v1/"):
        return str(answer.json()["error"]["message"])
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["detail"])


def test_every_route_has_its_scope(closed: House, tokens: dict[tuple[Scope, ...], str]) -> None:
    """Every route is open to exactly the keys with its scope, or with `admin`; the others are told what is missing."""
    client = TestClient(closed.app, raise_server_exceptions=False)
    for method, path in served(closed):
        needed = "read" if method == "GET" else NEEDED[f"{method} {path}"]
        for held, token in tokens.items():
            answer = client.request(method, named(path), headers={"Authorization": f"Bearer {token}"})
            allowed = needed in held or "admin" in held
            assert (answer.status_code != 403) is allowed, (method, path, held)
            assert answer.status_code != 401
            if not allowed:
                assert f"`{needed}`" in said(answer)
        assert client.request(method, named(path)).status_code == 401


def test_the_scope_is_looked_at_before_the_body(closed: House, tokens: dict[tuple[Scope, ...], str]) -> None:
    """A body that nobody may send is not read."""
    headers = {"Authorization": f"Bearer {tokens[(Scope.READ,)]}"}
    assert TestClient(closed.app).post("/edits", content=b"{", headers=headers).status_code == 403


def test_a_route_without_a_scope_cannot_be_made() -> None:
    """Whoever adds a route that changes something must say which keys it is for."""
    router = APIRouter(route_class=Door)
    with pytest.raises(KeyError):
        router.post("/forgotten")(lambda: None)


def test_every_scope_belongs_to_a_route(closed: House) -> None:
    """The table names no route that is gone."""
    assert set(SCOPES) <= set(served(closed))


def test_what_the_door_says_is_documented(closed: House) -> None:
    """Every operation behind the door documents that a key may be missing, too small or too busy."""
    document = closed.app.openapi()["paths"]
    for path, operations in document.items():
        for operation in operations.values():
            assert ({"401", "403", "429"} <= set(operation["responses"])) is (path not in OPEN)


@pytest.mark.parametrize("more", [0, 1])
def test_the_largest_body_is_a_setting(tmp_path: Path, more: int) -> None:
    """A body of `max_body` bytes is read, and one of a byte more is not, whether it says so or not."""
    house = House(tmp_path, max_body=2000)
    client = TestClient(house.app)
    body = b'{"prompt": "' + b"x" * (2000 + more - 14) + b'"}'
    assert len(body) == 2000 + more
    json = {"content-type": "application/json"}
    statuses = {
        client.post("/edits", content=body, headers=json).status_code,
        client.post("/edits", content=iter([body[:7], body[7:]]), headers=json).status_code,
    }
    house.close()
    assert statuses == {413 if more else 422}


def test_plain_routes_stay_what_they_are() -> None:
    """A route's own documentation goes before the door's."""
    router = APIRouter(route_class=Door)
    router.get("/own", responses={401: {"description": "mine"}})(lambda: None)
    (route,) = router.routes
    assert isinstance(route, APIRoute)
    assert route.responses[401] == {"description": "mine"}
