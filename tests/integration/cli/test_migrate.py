"""`palimpsest migrate`: cli.migrate."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main


def test_migrate_prints_both_revisions(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run migrates an empty database; the second has nothing to do."""
    command = ["migrate", "--database-url", database_url, "--data-dir", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("Migrated the database from empty to 0")
    assert main(command) == 0
    revision = first.split()[-1]
    assert capsys.readouterr().out == f"The database is already at revision {revision}\n"


def test_migrate_to_an_older_revision(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--to` migrates to an older revision, for the rollback of a release."""
    command = ["migrate", "--database-url", database_url, "--data-dir", str(tmp_path)]
    assert main(command) == 0
    newest = capsys.readouterr().out.split()[-1].rstrip(".")
    assert main([*command, "--to", "0001"]) == 0
    assert capsys.readouterr().out == f"Migrated the database from {newest} to 0001.\n"
