"""The commands of `palimpsest keys`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.main import main
from service.application.api_keys import ApiKeys, is_token
from service.db.database import Database

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a data folder that does not exist yet."""
    folder = tmp_path / "data"
    monkeypatch.setenv("PALIMPSEST_DATA_DIR", str(folder))
    return folder


def create_key(*more: str, name: str = "nightly-eval", scopes: str = "read,edit") -> int:
    return main(["keys", "create", "--name", name, "--scopes", scopes, *more])


def test_the_token_alone_goes_to_stdout(data: Path, capsys: Captured) -> None:
    """`keys create` prints only the token to stdout. The usage and the scopes are printed to stderr, without
    the token."""
    assert create_key() == 0
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert is_token(token)
    assert shown.out == token + "\n"
    assert token not in shown.err
    assert "Authorization: Bearer" in shown.err
    assert "read,edit" in shown.err


def test_the_token_is_valid(data: Path, capsys: Captured) -> None:
    """The printed token is a key of the configured database, with the requested scopes and limits."""
    assert create_key("--requests-per-minute", "60", "--max-queued", "5", scopes="edit, read") == 0
    database = Database(f"sqlite:///{data / 'palimpsest.sqlite3'}")
    key = ApiKeys(database).verify(capsys.readouterr().out.strip())
    database.close()
    assert key is not None
    assert (key.name, sorted(key.scopes), key.requests_per_minute, key.max_queued) == (
        "nightly-eval",
        ["edit", "read"],
        60,
        5,
    )


def test_creating_the_first_key_warns(data: Path, capsys: Captured) -> None:
    """Creating the first key prints a warning that every request needs a key; creating another key
    does not."""
    create_key(name="first")
    assert "every request needs a key" in capsys.readouterr().err
    create_key(name="second")
    assert "every request needs a key" not in capsys.readouterr().err


def test_the_list_shows_every_key_and_no_secret(data: Path, capsys: Captured) -> None:
    """`keys list` prints each key with its scopes and the times of its creation and revocation, without
    tokens."""
    assert main(["migrate"]) == 0
    assert main(["keys", "list"]) == 0
    assert "no keys" in capsys.readouterr().out
    create_key(name="one")
    create_key(name="two", scopes="admin")
    secrets = capsys.readouterr().out.split()
    assert main(["keys", "revoke", "two"]) == 0
    assert "two" in capsys.readouterr().out
    assert main(["keys", "list"]) == 0
    shown = capsys.readouterr().out
    one, two = (line for line in shown.splitlines() if re.match(r"\s*(one|two)\b", line))
    assert "read,edit" in one
    assert "admin" in two
    assert (one.count(":"), two.count(":")) == (1, 2)  # created; created and revoked
    assert not any(secret in shown for secret in secrets)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["create", "--name", "A b", "--scopes", "read"], "a-z"),
        (["create", "--name", "x", "--scopes", "write"], "read, edit, admin"),
        (["create", "--name", "x", "--scopes", ""], "read, edit, admin"),
        (["create", "--name", "x", "--scopes", "read", "--max-queued", "0"], "max_queued"),
        (["create", "--name", "taken", "--scopes", "read"], "choose another"),
        (["revoke", "nobody"], "palimpsest keys list"),
    ],
)
def test_invalid_key_commands_are_reported(data: Path, capsys: Captured, asked: list[str], said: str) -> None:
    """An invalid name, scope or limit exits with 1 and a message that says what to change."""
    create_key(name="taken")
    capsys.readouterr()
    assert main(["keys", *asked]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_a_data_folder_that_cannot_be_made_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A data folder that cannot be created is a configuration error that names the variable."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PALIMPSEST_DATA_DIR", str(tmp_path / "file" / "data"))
    assert create_key() == 2
    assert "PALIMPSEST_DATA_DIR" in capsys.readouterr().err
