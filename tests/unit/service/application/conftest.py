"""Operations on both wirings, with a worker that is stepped by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.application import Operations
from service.bootstrap import Wired
from service.db.database import Database
from service.jobs.broker import Broker
from service.jobs.job_store import Desk
from service.settings import Settings
from tests.support.served_model import INFO, tokenizer_json
from tests.support.service_requests import edit_request


@pytest.fixture
def database(wired: Wired) -> Any:
    return wired.database


@pytest.fixture
def broker(wired: Wired) -> Any:
    return wired.broker


@pytest.fixture
def bare(database: Database, broker: Broker, tmp_path: Path) -> Any:
    """Before any worker has come up."""
    return Operations(database, broker, Settings(data=tmp_path, max_queue=5))


@pytest.fixture
def desk(database: Database, broker: Broker) -> Any:
    desk = Desk(database, broker, "fingerprint", "worker-1")
    desk.register(INFO, tokenizer_json(), ["generate", "edit"])
    return desk


@pytest.fixture
def operations(bare: Operations, desk: Desk) -> Any:
    return bare


@pytest.fixture
def ask(operations: Operations) -> Any:
    return lambda *args, **more: operations.edits.submit([edit_request(*args, **more)], "somebody")[0]["id"]


@pytest.fixture
def landed(ask: Callable[..., Any], desk: Desk) -> Any:
    """Ask for an edit, and have it applied."""

    def landed(*args: Any, **more: Any) -> Any:
        edit = ask(*args, **more)
        desk.apply(desk.start(edit), desk.head(), edit.encode(), {}, {})
        return edit

    return landed
