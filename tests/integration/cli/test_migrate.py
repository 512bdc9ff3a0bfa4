"""`palimpsest migrate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main


def test_migrate_says_from_where_to_where(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first time the database was empty; the second time there is nothing to do."""
    command = ["migrate", "--database-url", database_url, "--data-dir", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("The database was empty and is at 0")
    assert main(command) == 0
    revision = first.split()[-2]
    assert capsys.readouterr().out == f"The database is at {revision} already.\n"


def test_migrate_to_an_older_revision(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--to` goes back to a revision by name, for a release that is rolled back."""
    command = ["migrate", "--database-url", database_url, "--data-dir", str(tmp_path)]
    assert main(command) == 0
    newest = capsys.readouterr().out.split()[-2]
    assert main([*command, "--to", "0001"]) == 0
    assert capsys.readouterr().out == f"The database was at {newest} and is at 0001 now.\n"
