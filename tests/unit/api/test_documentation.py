"""The pages of the HTTP interface, /docs and /redoc: their files, their policy and their origin."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.routes.documentation import DOCUMENTATION_DIR, PAGES
from api.security_headers import DOCS_CSP

VENDORED = json.loads((DOCUMENTATION_DIR / "vendored.json").read_text(encoding="utf-8"))


@pytest.fixture
def wiring() -> dict[str, Any]:
    """Return the embedded wiring only, because static files do not depend on the stores."""
    return {}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_loads_from_this_service_only(client: TestClient, path: str) -> None:
    """Every script, style and icon that a page names is served here, and its policy allows no other host."""
    page = client.get(path)
    assert page.headers["content-security-policy"] == DOCS_CSP
    assert not re.search(r"https?:|\*", DOCS_CSP)
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) >= 4
    for address in named:
        assert client.get(f"/{address}").status_code == 200, address


@pytest.mark.parametrize("name", VENDORED)
def test_the_viewers_are_those_of_their_packages(client: TestClient, name: str) -> None:
    """A vendored file has the digest that is recorded for it, and is served as it is."""
    served = client.get(f"/docs/{name}").content
    assert hashlib.sha512(served).hexdigest() == VENDORED[name]["sha512"]


@pytest.mark.parametrize("name", [*PAGES, "vendored.json", "README.md", "nothing.js", "..%2fapp.py"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    """A page has one address, and other files of the folder have none."""
    assert client.get(f"/docs/{name}").status_code == 404
