"""The sources of settings: flags, environment variables and secret files."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from cli.flags import add_setting_flags, read_settings
from service.errors import Misconfigured
from service.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the PALIMPSEST_ variables of the machine from the environment."""
    for name in os.environ:
        if name.startswith("PALIMPSEST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to which PALIMPSEST_SECRETS is set."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv("PALIMPSEST_SECRETS", str(folder))
    return folder


def read_flags(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, Settings)
    return read_settings(parser.parse_args(flags), Settings)


@pytest.mark.parametrize("name", ["api_key", "database_url", "redis_url"])
def test_a_secret_may_come_from_a_file(secrets: Path, name: str) -> None:
    """A secret is read from the file with its name, without the line break at the end."""
    (secrets / f"palimpsest_{name}").write_text("swordfish\n")
    assert getattr(Settings(), name) == "swordfish"
    assert getattr(read_flags(), name) == "swordfish"


def test_flags_come_before_the_environment_before_files(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags override the environment, which overrides files."""
    (secrets / "palimpsest_api_key").write_text("file")
    assert read_flags().api_key == "file"
    monkeypatch.setenv("PALIMPSEST_API_KEY", "environment")
    assert read_flags().api_key == "environment"
    assert read_flags("--api-key", "flag").api_key == "flag"


def test_no_secrets_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset or empty PALIMPSEST_SECRETS has no effect."""
    assert Settings().api_key is None
    monkeypatch.setenv("PALIMPSEST_SECRETS", "")
    assert Settings().api_key is None


def test_missing_secrets_folder_is_an_error(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing secrets folder raises Misconfigured, so that a service does not start without its API key."""
    monkeypatch.setenv("PALIMPSEST_SECRETS", str(secrets / "nowhere"))
    with pytest.raises(Misconfigured) as error:
        read_flags()
    assert "PALIMPSEST_SECRETS" in error.value.detail


def test_a_link_inside_the_folder_is_followed(secrets: Path) -> None:
    """A secret that is mounted as a symbolic link is read."""
    (secrets / "..data").mkdir()
    (secrets / "..data" / "palimpsest_api_key").write_text("swordfish")
    (secrets / "palimpsest_api_key").symlink_to(secrets / "..data" / "palimpsest_api_key")
    assert Settings().api_key == "swordfish"


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, such as `PALIMPSEST_THREADS=`, has the effect of an unset one."""
    for name in ("THREADS", "REDIS_URL", "LEASE"):
        monkeypatch.setenv(f"PALIMPSEST_{name}", "")
    assert (Settings().threads, Settings().redis_url, Settings().worker_timeout) == (None, None, 30.0)
