"""The static files of the console: responses, content security policy and forbidden content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.routes.console import CONSOLE_DIR
from api.security_headers import CONSOLE_CSP, DEFAULT_HEADERS
from api.static_files import MEDIA_TYPES, files_of
from tests.support.application import TestApp

SCRIPTS = sorted(CONSOLE_DIR.glob("*.js"))


@pytest.fixture
def wiring() -> dict[str, Any]:
    """Return the embedded wiring only, because static files do not depend on the stores."""
    return {}


def test_the_page_is_for_people(client: TestClient) -> None:
    """`/` is HTML with a content security policy that allows no other host."""
    answer = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == CONSOLE_CSP
    assert not re.search(r"unsafe|https?:|\*", CONSOLE_CSP)
    rest = DEFAULT_HEADERS.keys() - {"Cache-Control", "Content-Security-Policy"}
    assert {name: answer.headers[name] for name in rest} == {name: DEFAULT_HEADERS[name] for name in rest}


def test_a_program_is_told_where_to_go(client: TestClient) -> None:
    """A request for `/` that accepts only JSON gets 406 with a pointer to the OpenAPI document."""
    answer = client.get("/", headers={"Accept": "application/json"})
    assert answer.status_code == 406
    assert "/openapi.json" in answer.json()["detail"]


def test_everything_the_page_names_is_there(client: TestClient) -> None:
    """Each style, script and icon that the page or a script references is served with its media type. The
    folder has no other files."""
    page = client.get("/").text
    named = {name.removeprefix("console/") for name in re.findall(r'(?:src|href)="(console/[^"]+)"', page)}
    for script in SCRIPTS:
        named |= {f"{name}.js" for name in re.findall(r'from "\./([\w]+)\.js"', script.read_text())}
    assert named == {path.name for path in CONSOLE_DIR.iterdir()} - {"index.html"}
    for name in named:
        answer = client.get(f"/console/{name}")
        assert answer.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
        assert answer.content == (CONSOLE_DIR / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["nothing.js", "index.html", "..%2fapp.py", "%2e%2e/app.py", ".", "main.js%00"]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    """A name that is not a file of the console gets 404, including path traversal."""
    assert client.get(f"/console/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/", "/console/main.js"])
def test_what_a_browser_has_is_not_sent_again(client: TestClient, path: str) -> None:
    """A matching entity tag, weak or strong, gets 304 without a body."""
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_no_key_is_needed_to_read_it(tmp_path: Path) -> None:
    """The files of the console need no API key, and the routes that it calls need one."""
    test_app = TestApp(tmp_path, api_key="k" * 16)
    stranger = TestClient(test_app.app)
    assert {stranger.get(path).status_code for path in ("/", "/console/style.css")} == {200}
    assert stranger.get("/ledger").status_code == 401
    test_app.close()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_data_never_becomes_markup(script: Path) -> None:
    """No script creates markup from text, evaluates text as code, or sets a handler attribute."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.on|DOMParser"
    assert not re.search(forbidden, script.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere() -> None:
    """No file of the console references another host, apart from the SVG namespace."""
    for name, part in files_of(CONSOLE_DIR).items():
        text = part.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//\w+\.\w+/|@import", text), name


def test_markup_has_no_code_and_no_style_of_its_own() -> None:
    """The page has no inline script, style or handler."""
    page = files_of(CONSOLE_DIR)["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
