"""The application services on both wirings, with the parts of a worker that tests call directly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.application import Services
from service.bootstrap import Container
from service.db.database import Database
from service.jobs.broker import Broker
from service.settings import Settings
from tests.support.job_rows import claim_job
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import edit_request
from tests.support.workers import WorkerParts


@pytest.fixture
def database(container: Container) -> Any:
    return container.database


@pytest.fixture
def broker(container: Container) -> Any:
    return container.broker


@pytest.fixture
def services_without_model(database: Database, broker: Broker, tmp_path: Path) -> Any:
    """The services before any worker has registered a model."""
    return Services(database, broker, Settings(data_dir=tmp_path, max_queue=5))


@pytest.fixture
def worker(database: Database, broker: Broker) -> Any:
    worker = WorkerParts(database, broker, "fingerprint", "worker-1")
    worker.session.register(INFO, tokenizer_json(), ["generate", "edit"])
    return worker


@pytest.fixture
def services(services_without_model: Services, worker: WorkerParts) -> Any:
    return services_without_model


@pytest.fixture
def submit_edit(services: Services) -> Any:
    return lambda *args, **more: services.edits.submit([edit_request(*args, **more)], "somebody")[0]["id"]


@pytest.fixture
def applied_edit(submit_edit: Callable[..., Any], worker: WorkerParts) -> Any:
    """Return a function that submits an edit, commits it, and returns its id."""

    def apply_new_edit(*args: Any, result: dict[str, Any] | None = None, **more: Any) -> Any:
        edit = submit_edit(*args, **more)
        worker.jobs.commit_edit(
            claim_job(worker, edit), worker.ledger.head(), edit.encode(), {}, result or {}
        )
        return edit

    return apply_new_edit
