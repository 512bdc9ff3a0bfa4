"""The wiring."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.bootstrap import wire
from service.errors import Misconfigured
from service.jobs.memory_broker import MemoryBroker
from service.jobs.redis_broker import RedisBroker
from service.settings import Settings


def test_nothing_configured(tmp_path: Path) -> None:
    """With nothing configured there is SQLite in a data folder made for it, and the in-process broker."""
    folder = tmp_path / "a" / "b"
    wired = wire(Settings(data=folder))
    wired.database.migrate()
    assert (folder / "palimpsest.sqlite3").exists()
    assert isinstance(wired.broker, MemoryBroker)
    assert wired.operations.database is wired.database
    assert wired.sole
    wired.close()


def test_postgres(tmp_path: Path) -> None:
    """A postgresql:// URL is taken as it is usually written, and nothing connects yet."""
    wired = wire(Settings(data=tmp_path, database_url="postgresql://somebody@127.0.0.1:1/x"))
    assert wired.database.engine.dialect.name == "postgresql"
    wired.close()


def test_redis(tmp_path: Path) -> None:
    """With a Redis the work is shared through it, with its lease and names, and nothing connects yet."""
    wired = wire(Settings(data=tmp_path, redis_url="redis://127.0.0.1:1", lease=7))
    assert isinstance(wired.broker, RedisBroker)
    assert wired.broker.lease == 7
    assert not wired.sole
    wired.close()


def test_a_crash_point_is_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting for tests is taken, and one that is no crash point refused."""
    armed = []
    monkeypatch.setattr("service.kit.crash_points.arm", armed.append)
    wire(Settings(data=tmp_path, crash_at="take.after")).close()
    assert armed == ["take.after"]
    monkeypatch.undo()
    with pytest.raises(Misconfigured, match="crash point"):
        wire(Settings(data=tmp_path, crash_at="never"))


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    """A data folder that cannot be made is said so."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="PALIMPSEST_DATA"):
        wire(Settings(data=tmp_path / "file" / "data"))
