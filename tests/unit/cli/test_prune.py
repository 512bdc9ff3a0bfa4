"""The command `palimpsest prune`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cli.main import main
from service.bootstrap import open_database
from service.db.database import Database
from service.db.models import IdempotencyKey, now
from service.settings import Settings
from tests.support.migrations import migrate


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Return a database with a key of ten days."""
    database = open_database(Settings(data_dir=tmp_path))
    migrate(database)
    row = {"fingerprint": "f", "resources": [], "status_code": 202, "created": now() - timedelta(days=10)}
    with database.write_session() as session:
        session.add(IdempotencyKey(actor="a", key="k", **row))
    yield database
    database.close()


def test_prune(database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` counts what `prune` deletes, with the retention of the flags."""
    command = ["prune", "--data-dir", str(tmp_path)]
    assert main([*command, "--json", "--idempotency-key-retention-days", "11"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "dry_run": False,
        "jobs": 0,
        "idempotency_keys": 0,
        "attestations": 0,
    }
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == "Would delete 0 jobs, 1 idempotency keys and 0 attestations.\n"
    assert main(command) == 0
    assert capsys.readouterr().out == "Deleted 0 jobs, 1 idempotency keys and 0 attestations.\n"
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "dry_run": True,
        "jobs": 0,
        "idempotency_keys": 0,
        "attestations": 0,
    }
