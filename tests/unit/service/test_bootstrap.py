"""Construction of the service from its settings: service.bootstrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.bootstrap import build_container
from service.errors import Misconfigured
from service.jobs.memory_broker import MemoryBroker
from service.jobs.redis_broker import RedisBroker
from service.settings import Settings


def test_nothing_configured(tmp_path: Path) -> None:
    """Without settings the service uses SQLite in a new data folder and the in-process broker."""
    folder = tmp_path / "a" / "b"
    container = build_container(Settings(data_dir=folder))
    container.database.migrate()
    assert (folder / "palimpsest.sqlite3").exists()
    assert isinstance(container.broker, MemoryBroker)
    assert container.services.database is container.database
    assert container.single_process
    container.close()


def test_postgres(tmp_path: Path) -> None:
    """A postgresql:// URL without a driver is accepted, and no connection is made."""
    container = build_container(
        Settings(data_dir=tmp_path, database_url="postgresql://somebody@127.0.0.1:1/x")
    )
    assert container.database.engine.dialect.name == "postgresql"
    container.close()


def test_redis(tmp_path: Path) -> None:
    """With a Redis URL the service uses the Redis broker with the configured lease, and no connection is
    made."""
    container = build_container(
        Settings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1", worker_timeout=7)
    )
    assert isinstance(container.broker, RedisBroker)
    assert container.broker.lease == 7
    assert not container.single_process
    container.close()


def test_a_crash_point_is_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash point is armed from the settings, and an unknown one is rejected."""
    armed: list[str] = []
    monkeypatch.setattr("service.kit.crash_points.arm", armed.append)
    build_container(Settings(data_dir=tmp_path, crash_at="take.after")).close()
    assert armed == ["take.after"]
    monkeypatch.undo()
    with pytest.raises(Misconfigured, match="crash point"):
        build_container(Settings(data_dir=tmp_path, crash_at="never"))


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    """A data folder that cannot be created raises Misconfigured, which names the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="PALIMPSEST_DATA_DIR"):
        build_container(Settings(data_dir=tmp_path / "file" / "data"))
