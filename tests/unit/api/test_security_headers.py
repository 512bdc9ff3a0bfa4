"""Security headers: api.security_headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.security_headers import DEFAULT_HEADERS
from service.tracing import heatmap
from tests.support.application import TRACE_RESULT, TestApp

ROUTES_AND_STATUSES = [
    ("GET", "/edits", 200),
    ("GET", "/healthz", 200),
    ("GET", "/openapi.json", 200),
    ("GET", "/nowhere", 404),
    ("GET", "/generate", 405),
    ("POST", "/generate", 422),
    ("GET", "/ledger", 500),
]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES_AND_STATUSES)
def test_every_response_has_the_default_headers(
    client: TestClient,
    test_app: TestApp,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    status: int,
) -> None:
    """Every response has the default security headers, also a 500."""

    def fails(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(test_app.services.ledger, "page", fails)
    answer = client.request(method, path)
    assert answer.status_code == status
    assert {name: answer.headers[name] for name in DEFAULT_HEADERS} == DEFAULT_HEADERS


def test_unauthorized_responses_have_the_default_headers(tmp_path: Path) -> None:
    """A 401 has the default security headers."""
    test_app = TestApp(tmp_path, api_key="k" * 16)
    answer = TestClient(test_app.app).get("/edits")
    test_app.close()
    assert answer.status_code == 401
    assert {name: answer.headers[name] for name in DEFAULT_HEADERS} == DEFAULT_HEADERS


@pytest.mark.parametrize("render", [heatmap.trace_page, heatmap.trace_svg])
def test_rendered_traces_conform_to_the_csp(render: Any) -> None:
    """The page and the image of a trace have no scripts and no external references."""
    rendered = render(TRACE_RESULT)
    assert not re.search(r"<script|<link|<iframe|<object|<form|@import|\son\w+=|javascript:", rendered)
    assert not re.search(r'(?:src|href)="(?!#|data:image/)', rendered)
    assert not re.search(r"url\((?!#)", rendered)


def test_a_route_may_say_otherwise(client: TestClient, test_app: TestApp) -> None:
    """A header that a route sets overrides the default header."""

    @test_app.app.get("/kept")
    def kept() -> Any:
        from fastapi import Response

        return Response(headers={"Cache-Control": "max-age=60"})

    assert client.get("/kept").headers["cache-control"] == "max-age=60"
