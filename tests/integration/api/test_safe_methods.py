"""GET, HEAD and OPTIONS change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from service.db.database import Database
from service.db.models import Base
from tests.support import wirings
from tests.support.application import PROMPT, TOWER, TestApp
from tests.support.scopes import TRAINING_RECORDS

KEY = "sesame-sesame-sesame"
#: requests that create a job of each kind, by the path of the kind
BODIES: dict[str, dict[str, Any]] = {
    "/edits": TOWER,
    "/trace": {"prompt": PROMPT, "subject": "Eiffel Tower"},
    "/evaluations": {"records": [TOWER]},
    "/trainings": {"records": TRAINING_RECORDS},
    "/exports": {"format": "peft"},
}


def all_rows(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Return the rows of every table, except the heartbeats of workers."""
    rows = {}
    with database.read_session() as session:
        for table in Base.metadata.sorted_tables:
            columns = [column for column in table.columns if column.name != "heartbeat"]
            rows[table.name] = sorted(map(tuple, session.execute(select(*columns)).all()), key=repr)
    return rows


@pytest.fixture(scope="module", params=wirings.ALL_WIRINGS)
def test_app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestApp]:
    """An application with a root key and a fake worker."""
    built = TestApp(tmp_path_factory.mktemp("safe"), api_key=KEY, **wirings.store_settings(request))
    built.start_fake_worker()
    yield built
    built.close()


@pytest.fixture(scope="module")
def client(test_app: TestApp) -> TestClient:
    return TestClient(test_app.app, headers={"Authorization": f"Bearer {KEY}"})


@pytest.fixture(scope="module")
def ended_jobs(client: TestClient) -> dict[str, str]:
    """Return the id of an ended job of each kind, by the path of the kind."""
    ended = {}
    for path, body in BODIES.items():
        job = client.post(path, json=body, headers={"Prefer": "wait=30"}).json()
        assert job["status"] in ("applied", "done"), job
        ended[path] = job["id"]
    return ended


@pytest.fixture(scope="module")
def queued_jobs(client: TestClient, test_app: TestApp, ended_jobs: dict[str, str]) -> dict[str, str]:
    """Return the id of a job of each kind that no worker runs, by the path of the kind."""
    assert test_app.worker is not None
    test_app.worker.stop()
    test_app.worker = None
    bodies = BODIES | {"/exports": {"format": "safetensors"}}  # the other export would be returned again
    queued = {path: client.post(path, json=body).json() for path, body in bodies.items()}
    assert {job["status"] for job in queued.values()} == {"queued"}
    return {path: job["id"] for path, job in queued.items()}


def readable_paths(test_app: TestApp) -> list[str]:
    """Return the paths that have GET: those of the OpenAPI document, and those of the description and the console."""
    documented = [path for path, item in test_app.app.openapi()["paths"].items() if "get" in item]
    return [*documented, "/", "/console/main.js", "/docs", "/redoc", "/docs/swagger.js", "/openapi.json"]


def urls_of(path: str, *jobs: dict[str, str]) -> list[str]:
    """Return the path with the id of each job of its kind, or as it is."""
    if "{id}" not in path:
        return [path]
    kind = path.partition("/{id}")[0]
    return [path.replace("{id}", ids.get(kind, "tiny")) for ids in jobs]


def test_reading_changes_no_row(
    test_app: TestApp, client: TestClient, ended_jobs: dict[str, str], queued_jobs: dict[str, str]
) -> None:
    """GET, HEAD and OPTIONS of every route, on ended and on queued jobs, leave every row of every table as it is."""
    before = all_rows(test_app.database)
    statuses: dict[str, int] = {}
    for path in readable_paths(test_app):
        jobs = (
            (ended_jobs,) if path.endswith("/events") else (ended_jobs, queued_jobs)
        )  # an open stream does not end
        for url in urls_of(path, *jobs):
            for method in ("GET", "HEAD", "OPTIONS"):
                statuses[f"{method} {url}"] = client.request(method, url).status_code
                assert all_rows(test_app.database) == before, f"{method} {url}"
    assert len(statuses) > 60
    assert [url for url, status in statuses.items() if status >= 500] == []
    assert sum(status == 200 for url, status in statuses.items() if url.startswith("GET ")) > 20
