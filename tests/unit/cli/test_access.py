"""The development mode at the start of a process: cli.access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from cli.access import NO_KEY_NOTICE, NOTICES, access_notice, resolve_development
from cli.main import main
from service.application.api_keys import ApiKeys
from service.application.development import MARKER_NAME, Development
from service.db.database import Database
from service.db.models import ApiKey
from service.settings import Settings

SERVE, API = Development.UNTIL_FIRST_KEY, Development.OFF


def start(database: Database, folder: Path, default: Development, **settings: Any) -> tuple[Development, str]:
    """Return the mode of a process that starts, and what it says."""
    configured = Settings(data_dir=folder, **settings)
    mode = resolve_development(configured, database, default)
    return mode, access_notice(configured, database, mode)


def test_serve_says_that_it_is_in_development_mode(database: Database, tmp_path: Path) -> None:
    """`palimpsest serve` with nothing configured is in development mode and says so; `palimpsest api` is not, and says
    what to do."""
    assert start(database, tmp_path, SERVE) == (SERVE, NOTICES[SERVE])
    assert start(database, tmp_path, API) == (Development.OFF, NO_KEY_NOTICE)
    assert start(database, tmp_path, API, development=True) == (Development.ON, NOTICES[Development.ON])
    assert start(database, tmp_path, SERVE, host="192.0.2.1")[0] is Development.OFF


def test_with_a_key_nothing_is_said(database: Database, tmp_path: Path) -> None:
    """A process that needs a key, and has one, says nothing about it."""
    ApiKeys(database).create("first", ["read"])
    assert start(database, tmp_path, SERVE) == (Development.OFF, "")
    assert start(database, tmp_path, API) == (Development.OFF, "")


@pytest.mark.parametrize("key", ["root key", "revoked key", "deleted key"])
def test_a_start_without_the_keys_of_before_says_what_to_do(
    database: Database, tmp_path: Path, key: str
) -> None:
    """After a key has existed, a start without one accepts nobody, and says how to create a key or to allow requests
    without one. With --development they are accepted."""
    if key == "root key":
        start(database, tmp_path, SERVE, api_key="k" * 16)
    else:
        ApiKeys(database).create("first", ["read"])
        start(database, tmp_path, SERVE)
        ApiKeys(database).revoke("first")
    if key == "deleted key":
        with database.write_session() as session:
            session.execute(delete(ApiKey))
    assert start(database, tmp_path, SERVE) == (Development.OFF, NO_KEY_NOTICE)
    assert start(database, tmp_path, SERVE, development=True)[0] is Development.ON


def test_creating_a_key_is_recorded_outside_the_database(tmp_path: Path) -> None:
    """`palimpsest keys create` writes a file into the data folder; listing an empty table does not."""
    folder = ["--data-dir", str(tmp_path)]
    assert main(["migrate", *folder]) == 0
    assert main(["keys", "list", *folder]) == 0
    assert not (tmp_path / MARKER_NAME).exists()
    assert main(["keys", "create", "--name", "first", "--scopes", "read", *folder]) == 0
    assert (tmp_path / MARKER_NAME).exists()


@pytest.mark.parametrize("more", [["--host", "0.0.0.0"], ["--api-key", "k" * 16]])
def test_development_mode_has_no_key_and_no_other_address(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--development` with an address of the network, or with a root key, is refused at the start."""
    assert main(["serve", "--development", "--data-dir", str(tmp_path / "data"), *more]) == 2
    assert "--development" in capsys.readouterr().err
