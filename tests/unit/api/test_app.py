"""The application as a whole: its API key, its address, its imports and its OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import MIN_ROOT_KEY_LENGTH, check_exposure, create_app
from service.application.api_keys import ApiKeys
from service.errors import Misconfigured
from service.settings import Settings
from tests.support.application import TOWER, FakeWorker, TestApp
from tests.support.paths import ROOT


def test_the_api_never_imports_torch() -> None:
    """Importing the application imports neither torch nor transformers."""
    code = "import sys, api.app; bad = {'torch', 'transformers'} & set(sys.modules); sys.exit(', '.join(bad) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EXPOSED = ["0.0.0.0", "::", "192.168.1.4", "example.org", ""]


@pytest.mark.parametrize("host", EXPOSED)
def test_without_a_key_only_loopback_is_served(tmp_path: Path, host: str) -> None:
    """A non-loopback address is rejected without an API key and accepted with one."""
    for key in (None, ""):
        with pytest.raises(Misconfigured):
            check_exposure(Settings(data_dir=tmp_path, host=host, api_key=key))
    check_exposure(Settings(data_dir=tmp_path, host=host, api_key="k" * MIN_ROOT_KEY_LENGTH))


def test_short_root_keys_are_refused() -> None:
    """A root key of fewer than 16 characters is refused at the start, and the message shows how to make one."""
    assert MIN_ROOT_KEY_LENGTH == 16
    with pytest.raises(Misconfigured, match=r"has 15 characters.*openssl rand"):
        check_exposure(Settings(api_key="k" * 15))
    check_exposure(Settings(api_key="k" * 16))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(tmp_path: Path, host: str) -> None:
    """A loopback address is accepted without an API key."""
    check_exposure(Settings(data_dir=tmp_path, host=host))


def test_a_made_key_is_no_root_key(test_app: TestApp) -> None:
    """A key created by `palimpsest keys create` is rejected as root key."""
    _, token = ApiKeys(test_app.database).create("k", ["read"])
    with pytest.raises(Misconfigured):
        check_exposure(Settings(api_key=token))


@pytest.mark.parametrize("host", EXPOSED)
def test_an_exposed_application_needs_a_key(test_app: TestApp, host: str) -> None:
    """On a non-loopback address the application is not created until the database has an API key. Requests
    without a key then get 401, also after the key is revoked."""
    settings = test_app.settings.model_copy(update={"host": host})
    check_exposure(settings)
    with pytest.raises(Misconfigured):
        create_app(test_app.services, test_app.broker, settings)
    keys = ApiKeys(test_app.database)
    keys.create("k", ["read"])
    app = create_app(test_app.services, test_app.broker, settings)
    assert TestClient(app).get("/edits").status_code == 401
    keys.revoke("k")
    assert TestClient(app).get("/edits").status_code == 401


@pytest.fixture
def app_with_root_key(tmp_path: Path) -> Any:
    test_app = TestApp(tmp_path, api_key="open sesame now é")
    yield test_app
    test_app.close()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic open sesame",
        "open sesame now",
        b"Bearer \xff\xfe",
    ],
)
def test_requests_without_the_root_key_get_401(
    app_with_root_key: TestApp, header: str | bytes | None
) -> None:
    """Without a valid key every route except the health routes returns 401, and no edit is created."""
    client = TestClient(app_with_root_key.app)
    sent = header.encode() if isinstance(header, str) else header
    headers = {} if sent is None else {b"authorization": sent}
    for method, path in [
        ("GET", "/edits"),
        ("GET", "/models"),
        ("GET", "/ledger/verify"),
        ("DELETE", "/edits/x"),
    ]:
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
    # the key is checked before the body
    assert client.post("/edits", content=b"{", headers=headers).status_code == 401
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    assert app_with_root_key.services.edits.page()["items"] == []


def test_the_key_names_the_actor(app_with_root_key: TestApp) -> None:
    """The resource names the actor and does not contain the API key."""
    headers = {b"authorization": "bearer  open sesame now é".encode()}
    answer = TestClient(app_with_root_key.app).post("/edits", json=TOWER, headers=headers)
    assert answer.status_code == 202
    assert answer.json()["actor"] == "key:root"
    assert "sesame" not in answer.text


def test_without_a_key_the_actor_is_local(client: TestClient) -> None:
    """On loopback without an API key the actor is `local`."""
    assert client.post("/edits", json=TOWER).json()["actor"] == "local"


def test_models_ledger_and_health(client: TestClient, worker: FakeWorker) -> None:
    """The routes for models, the ledger, its verification and readiness return the state after an edit and
    its revert."""
    edit = client.post("/edits", json=TOWER, headers={"prefer": "wait=20"}).json()
    client.delete(edit["links"]["self"])
    (model,) = client.get("/models").json()["items"]
    assert (model["name"], model["head"], model["layers"]) == ("tiny", 2, 3)
    page = client.get("/ledger", params={"limit": 1}).json()
    assert [entry["kind"] for entry in page["items"]] == ["apply"]
    rest = client.get("/ledger", params={"cursor": page["next"]}).json()
    assert [(entry["kind"], entry["actor"]) for entry in rest["items"]] == [("revert", "local")]
    assert rest["next"] is None
    assert [e["version"] for e in client.get("/ledger?version=1").json()["items"]] == [1]
    assert client.get("/ledger?version=9").status_code == 422
    verified = client.get("/ledger/verify").json()
    assert (verified["ok"], verified["entries"], verified["head"]) == (True, 2, 2)
    assert client.get("/readyz").json()["ready"] is True


def test_every_operation_documents_its_errors(test_app: TestApp) -> None:
    """Every operation has a summary, a tag and documented errors, and every JSON body has examples. Errors
    are problem documents, or OpenAI's errors below /v1."""
    document = test_app.app.openapi()
    assert document["info"]["title"] == "Palimpsest"
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert "Problem" in schemas
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["tags"]
            assert "500" in operation["responses"], path
            form = "application/json" if path.startswith("/v1/") else "application/problem+json"
            for status, answer in operation["responses"].items():
                if status >= "4":
                    assert list(answer["content"]) == [form]
            if "application/json" in (sent := operation.get("requestBody", {}).get("content", {})):
                assert sent["application/json"]["examples"]


def test_every_example_is_accepted(make_app: Callable[..., TestApp]) -> None:
    """Every example request of the OpenAPI document is accepted by a model with room for a conversation."""
    test_app = make_app(positions=256)
    test_app.start_fake_worker()
    client = TestClient(test_app.app, raise_server_exceptions=False)
    for path, operations in test_app.app.openapi()["paths"].items():
        sent = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for example in sent.get("application/json", {}).get("examples", {}).values():
            body = example["value"] | ({"model": "tiny"} if path.startswith("/v1/") else {})
            answer = client.post(path, json=body)
            # an example that names an edit is well-formed; the edit is not there
            accepted = (200, 404) if path == "/edits/revert" else (200, 202)
            assert answer.status_code in accepted, answer.text
