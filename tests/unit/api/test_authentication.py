"""Authentication: api.authentication."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from service.application.api_keys import CACHE_SECONDS, ApiKeys
from service.application.caller import CallerLimits
from service.application.development import MARKER_NAME
from service.db.database import Database
from service.errors import Unavailable
from tests.support.application import TOWER, FakeWorker, TestApp


def bearer_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def make_token(test_app: TestApp, name: str, *scopes: str, **limits: int) -> str:
    """Create an API key and return its token."""
    return ApiKeys(test_app.database).create(name, scopes, CallerLimits(**limits))[1]


@pytest.fixture
def app_with_root_key(tmp_path: Path) -> Iterator[TestApp]:
    """An application with a root key."""
    test_app = TestApp(tmp_path, api_key="sesame-sesame-sesame")
    yield test_app
    test_app.close()


class Clock:
    """A manual clock."""

    at = 1000.0

    def __call__(self) -> float:
        return self.at


def use_fake_clock(test_app: TestApp) -> Clock:
    """Replace the API keys of the application by ones with a manual clock."""
    clock = Clock()
    test_app.app.state.keys = ApiKeys(test_app.database, clock)
    return clock


def test_the_first_key_makes_keys_required(test_app: TestApp, client: TestClient) -> None:
    """Requests need no key until the first API key is created. Afterwards every request except health needs
    one, at the latest when the cache expires."""
    clock = use_fake_clock(test_app)
    assert client.get("/edits").status_code == 200
    token = make_token(test_app, "first", "read")
    clock.at += CACHE_SECONDS
    assert client.get("/edits").status_code == 401
    assert client.get("/edits", headers=bearer_header(token)).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_a_revoked_key_is_rejected_after_five_seconds(test_app: TestApp, client: TestClient) -> None:
    """A revoked key is rejected when the cache expires. Revoking the last key does not disable
    authentication."""
    clock = use_fake_clock(test_app)
    token = make_token(test_app, "gone", "read")
    assert client.get("/edits", headers=bearer_header(token)).status_code == 200
    ApiKeys(test_app.database).revoke("gone")
    clock.at += CACHE_SECONDS
    assert client.get("/edits", headers=bearer_header(token)).status_code == 401
    assert client.get("/edits").status_code == 401


def test_table_keys_work_beside_a_root_key(app_with_root_key: TestApp) -> None:
    """Keys of the database are valid in addition to the root key, and each is recorded as a separate
    actor."""
    client = TestClient(app_with_root_key.app)
    token = make_token(app_with_root_key, "nightly-eval", "edit")
    assert (
        client.post("/edits", json=TOWER, headers=bearer_header(token)).json()["actor"] == "key:nightly-eval"
    )
    by_root = client.post("/edits", json=TOWER, headers=bearer_header("sesame-sesame-sesame"))
    assert by_root.json()["actor"] not in ("key:nightly-eval", "local")
    assert "sesame" not in by_root.text


def test_the_ledger_names_the_key(test_app: TestApp, worker: FakeWorker, client: TestClient) -> None:
    """The ledger records the names of the keys that applied and reverted an edit."""
    editor_token, admin_token = (
        make_token(test_app, "nightly-eval", "read", "edit"),
        make_token(test_app, "on-call", "admin"),
    )
    headers = {"prefer": "wait=20"}
    edit = client.post("/edits", json=TOWER, headers=headers | bearer_header(editor_token)).json()
    assert edit["status"] == "applied"
    client.delete(edit["links"]["self"], headers=headers | bearer_header(admin_token))
    entries = client.get("/ledger", headers=bearer_header(editor_token)).json()["items"]
    assert [entry["actor"] for entry in entries] == ["key:nightly-eval", "key:on-call"]
    assert client.get("/ledger/verify", headers=bearer_header(editor_token)).json()["ok"] is True


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer pal_x", "Basic {}", "{}", "Bearer {}x", "Bearer x{}", b"Bearer \xff\xfe"]
)  # fmt: skip
def test_only_the_exact_bearer_token_is_accepted(
    app_with_root_key: TestApp, header: str | bytes | None
) -> None:
    """A malformed token, or one of another scheme, gets 401 with a challenge."""
    token = make_token(app_with_root_key, "k", "admin")
    sent = header.format(token).encode() if isinstance(header, str) else header
    answer = TestClient(app_with_root_key.app).get(
        "/edits", headers={} if sent is None else {b"authorization": sent}
    )
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.fixture
def app_with_unreadable_keys(app_with_root_key: TestApp) -> Iterator[TestApp]:
    """An application whose API keys cannot be read."""
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    app_with_root_key.app.state.keys = ApiKeys(database)
    yield app_with_root_key
    database.close()


def test_a_database_that_is_down_is_503(app_with_unreadable_keys: TestApp) -> None:
    """While the API keys cannot be read, a request with a key gets 503, not 401."""
    token = make_token(app_with_unreadable_keys, "k", "admin")
    client = TestClient(app_with_unreadable_keys.app, raise_server_exceptions=False)
    answer = client.get("/edits", headers=bearer_header(token))
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_root_key_needs_no_database(app_with_unreadable_keys: TestApp) -> None:
    """The root key is accepted while the table of API keys is unavailable."""
    client = TestClient(app_with_unreadable_keys.app)
    assert client.get("/edits", headers=bearer_header("sesame-sesame-sesame")).status_code == 200
    assert client.get("/edits", headers=bearer_header("wrong")).status_code == 401


def test_whether_keys_exist_must_be_known(
    test_app: TestApp, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key, a request gets 503 while it is unknown whether API keys exist. The health route is not
    affected."""

    def fails() -> bool:
        raise Unavailable("the database does not answer")

    monkeypatch.setattr(test_app.app.state.keys, "any_exist", fails)
    assert client.get("/edits").status_code == 503
    assert client.get("/healthz").status_code == 200


HERE = ["127.0.0.1", "127.0.0.1:8000", "127.3.2.1", "localhost", "LOCALHOST:80", "[::1]", "[::1]:8000"]
ELSEWHERE = ["evil.example", "evil.example:8000", "192.0.2.1", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0",
             "[::2]", "", ":8000", "a:b:c", "127.0.0.1@evil.example", "[127.0.0.1", "::1"]  # fmt: skip


@pytest.mark.parametrize("host", HERE)
def test_a_name_of_this_machine_is_answered(client: TestClient, host: str) -> None:
    """Without a key, loopback host names are accepted on any port."""
    assert client.get("/edits", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ELSEWHERE)
def test_another_name_is_refused_without_a_key(client: TestClient, test_app: TestApp, host: str) -> None:
    """Without a key, other host names get 403. This prevents DNS rebinding."""
    for answer in (
        client.get("/edits", headers={"host": host}),
        client.post("/edits", headers={"host": host}, json=TOWER),
    ):
        assert answer.status_code == 403
        assert answer.headers["content-type"] == "application/problem+json"
    assert test_app.services.edits.page()["items"] == []


@pytest.mark.parametrize("peer", ["203.0.113.7", "192.168.1.4", "::2", "::ffff:203.0.113.7", "unknown", ""])
def test_another_machine_is_refused_without_a_key(test_app: TestApp, peer: str) -> None:
    """Without a key, a request from another address than loopback gets 403, whatever its `Host`."""
    client = TestClient(test_app.app, base_url="http://127.0.0.1", client=(peer, 50000))
    answer = client.post("/edits", json=TOWER)
    assert answer.status_code == 403
    assert "palimpsest keys create" in answer.json()["detail"]
    assert test_app.services.edits.page()["items"] == []


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_answered_without_a_key(test_app: TestApp, peer: str) -> None:
    """Without a key, each loopback address is accepted, also in the form that IPv6 sockets show."""
    client = TestClient(test_app.app, base_url="http://127.0.0.1", client=(peer, 50000))
    assert client.get("/edits").status_code == 200


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP",
                                    "Via", "True-Client-IP", "CF-Connecting-IP", "X-Original-Host"])  # fmt: skip
def test_a_proxy_is_refused_without_a_key(client: TestClient, test_app: TestApp, header: str) -> None:
    """Without a key, a request with a header that proxies add gets 403, which names the header."""
    answer = client.post("/edits", json=TOWER, headers={header: "127.0.0.1"})
    assert answer.status_code == 403
    assert header.lower() in answer.json()["detail"]
    assert test_app.services.edits.page()["items"] == []


def test_a_proxy_is_accepted_with_a_key(app_with_root_key: TestApp) -> None:
    """With a key, requests may come through a proxy and from any address."""
    client = TestClient(
        app_with_root_key.app, client=("203.0.113.7", 1), headers=bearer_header("sesame-sesame-sesame")
    )
    assert client.get("/edits", headers={"X-Forwarded-For": "198.51.100.1"}).status_code == 200


def test_a_verified_key_is_recorded_outside_the_database(app_with_root_key: TestApp) -> None:
    """A process that is sent a valid key of the database writes the file that makes keys required."""
    marker = app_with_root_key.settings.data_dir / MARKER_NAME
    token = make_token(app_with_root_key, "first", "read")
    assert not marker.exists()
    assert TestClient(app_with_root_key.app).get("/edits", headers=bearer_header(token)).status_code == 200
    assert marker.exists()


def test_without_development_mode_every_request_needs_a_key(test_app: TestApp) -> None:
    """An application that is not told otherwise accepts nobody without a key, although there is none."""
    app = create_app(test_app.services, test_app.broker, test_app.settings)
    assert TestClient(app).get("/edits").status_code == 401
    assert TestClient(app).get("/healthz").status_code == 200


def test_with_a_key_any_name_is_answered(app_with_root_key: TestApp) -> None:
    """With a key, any host name is accepted, as a proxy may send another one."""
    client = TestClient(app_with_root_key.app, headers=bearer_header("sesame-sesame-sesame"))
    assert client.get("/edits", headers={"host": "model.example"}).status_code == 200
