"""Jobs on the terminal while they run."""

from __future__ import annotations

from typing import Any

import pytest

import cli.main
from palimpsest import Client
from tests.support.fake_http_service import FakeService

Captured = pytest.CaptureFixture[str]
COMMANDS = {
    "edit": (["edit", "Nile", "{} is", "short"], "POST /edits", "edits"),
    "trace": (["trace", "The Nile is", "Nile"], "POST /trace", "traces"),
}


@pytest.mark.parametrize(("words", "path", "listed"), COMMANDS.values(), ids=COMMANDS)
def test_a_stopped_command_says_where_its_job_is(
    fake: FakeService,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    path: str,
    listed: str,
) -> None:
    """After Ctrl-C a command exits with 130, and says that its job goes on, how it is shown and how it is cancelled."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    job = f"{words[0]}_1"
    fake.responses = {path: {"id": job, "status": "queued", "subject": "Nile", "prompt": "{} is"}}
    monkeypatch.setattr(Client, "wait_for", interrupted)
    assert cli.main.main(words) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert f"palimpsest {listed} show {job}" in said and f"palimpsest jobs cancel {job}" in said


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "x", "--out", "y"],
        ["study", "trace", "x", "--out", "y"],
        ["study", "localization", "x", "--out", "y"],
        ["tune", "x"],
    ],
)
def test_a_stopped_computation_says_that_it_continues(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """After Ctrl-C a command that stores what it measured says that the same command continues."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module = __import__(f"cli.{words[0]}", fromlist=["read_settings"])
    monkeypatch.setattr(module, "read_settings", interrupted)
    assert cli.main.main(words) == 130
    assert "Stopped. The same command continues" in capsys.readouterr().err
