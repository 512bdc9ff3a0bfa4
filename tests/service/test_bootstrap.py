"""The wiring."""

from __future__ import annotations

import pytest

from service.bootstrap import wire
from service.errors import Misconfigured
from service.jobs.memory import MemoryBroker
from service.settings import Settings


def test_nothing_configured(tmp_path):
    """With nothing configured there is SQLite in a data folder made for it, and the in-process broker."""
    folder = tmp_path / "a" / "b"
    wired = wire(Settings(data=folder))
    wired.database.migrate()
    assert (folder / "palimpsest.sqlite3").exists()
    assert isinstance(wired.broker, MemoryBroker)
    assert wired.operations.database is wired.database
    wired.close()


def test_postgres(tmp_path):
    """A postgresql:// URL is taken as it is usually written, and nothing connects yet."""
    wired = wire(Settings(data=tmp_path, database_url="postgresql://somebody@127.0.0.1:1/x"))
    assert wired.database.engine.dialect.name == "postgresql"
    wired.close()


def test_redis(tmp_path):
    """Redis is refused while it is not there, with what to do."""
    with pytest.raises(Misconfigured, match="next release"):
        wire(Settings(data=tmp_path, redis_url="redis://127.0.0.1"))


def test_folder_that_cannot_be(tmp_path):
    """A data folder that cannot be made is said so."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="PALIMPSEST_DATA"):
        wire(Settings(data=tmp_path / "file" / "data"))
