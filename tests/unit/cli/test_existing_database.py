"""Commands on the data of a service create none where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main
from service.bootstrap import open_database
from service.kit.signing import KEY_FILE
from service.settings import Settings
from tests.support.migrations import migrate

#: every command that reads a database or changes what is in it
COMMANDS = {
    "export": ["export", "--format", "model", "--out", "exported"],
    "prune": ["prune"],
    "prune --dry-run": ["prune", "--dry-run"],
    "audit verify": ["audit", "verify"],
    "audit key": ["audit", "key"],
    "audit rotate": ["audit", "rotate"],
    "audit accept": ["audit", "accept"],
    "keys list": ["keys", "list"],
    "keys revoke": ["keys", "revoke", "someone"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_missing_database_is_named_and_not_created(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the missing file and the flags, and no folder or file is created."""
    assert main([*command, "--data-dir", "data"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("palimpsest: there is no database data/palimpsest.sqlite3: ")
    assert "--data-dir" in said and "--database-url" in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_database_without_tables_is_no_traceback(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty file in the place of the database is an error of one line."""
    (folder / "palimpsest.sqlite3").touch()
    assert main([*command, "--data-dir", "."]) == 2
    said = capsys.readouterr().err
    assert "has no tables" in said and len(said.splitlines()) == 1


def test_a_missing_ledger_key_is_not_created(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the database exists and its key is lost, `audit key` says so and makes no other key."""
    database = open_database(Settings(data_dir=folder))
    migrate(database)
    database.close()
    (folder / KEY_FILE).unlink(missing_ok=True)
    assert main(["audit", "key", "--data-dir", "."]) == 2
    assert "PALIMPSEST_LEDGER_KEY" in capsys.readouterr().err
    assert not (folder / KEY_FILE).exists()
