"""Fixtures of the tests of jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.application import Services
from service.bootstrap import Container
from service.db.database import Database
from service.jobs.broker import Broker
from service.schemas import EditRequest
from service.settings import Settings
from tests.support.job_rows import MODEL
from tests.support.served_model import INFO, tokenizer_json
from tests.support.workers import WorkerParts


@pytest.fixture
def database(container: Container) -> Any:
    return container.database


@pytest.fixture
def broker(container: Container) -> Any:
    return container.broker


@pytest.fixture
def make_worker(database: Database, broker: Broker) -> Any:
    def make(worker: Any = "worker-1", model: Any = MODEL, **options: Any) -> Any:
        worker = WorkerParts(database, broker, model, worker, 3, **options)
        worker.session.register(INFO, tokenizer_json())
        return worker

    return make


@pytest.fixture
def worker(make_worker: Callable[..., WorkerParts]) -> Any:
    return make_worker()


@pytest.fixture
def services(database: Database, broker: Broker, worker: WorkerParts, tmp_path: Path) -> Any:
    return Services(database, broker, Settings(data_dir=tmp_path))


@pytest.fixture
def submit_edit(services: Services) -> Any:
    """Queue an edit and return its id."""

    def ask(subject: str = "Eiffel Tower", target: Any = "Rome", **more: Any) -> Any:
        request = EditRequest(subject=subject, prompt="The {} is located in", target_new=target, **more)
        return services.edits.submit([request], "somebody")[0]["id"]

    return ask
